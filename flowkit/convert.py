"""Weights of EDM, score_sde and RectifiedFlow as flowkit networks, and as folders that hold a flow.

    net = load_edm("cifar10.safetensors")        net = load_score_sde("checkpoint_8.pth", 32)

    python -m flowkit.convert edm cifar10.safetensors models/edm-cifar10
    python -m flowkit.convert score_sde checkpoint_8.pth models/rf-cifar10 --sample-size 32

The architecture is read off the names and shapes; what neither tells (dropout, the picture size of
a score_sde network, how the output becomes a velocity) is an argument.  The functions return the
raw network F, whose time scale and sign belong to flowkit.adapters; the command writes what
`from_diffusers` and `teacher=` read.  Nothing here needs torch before there is a file to read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowkit.config import run_command
from flowkit.errors import FlowkitError

if TYPE_CHECKING:
    from flowkit.nets.adm import ADM
    from flowkit.nets.ncsnpp import NCSNpp
    from flowkit.velocity import VelocityModel

__all__ = ["load_edm", "load_score_sde", "main"]


def load_edm(
    source: str | Path | Mapping[str, Any], *, dropout: float = 0.0, augmentation: bool = True
) -> NCSNpp | ADM:
    """The network inside an EDM checkpoint (NVlabs/edm: SongUNet or DhariwalUNet), in eval mode.

    source: a file or a state dict, with or without the preconditioning around the network.
    dropout: for further training; the published runs used .13 (CIFAR-10), .25 (AFHQ), .05 (FFHQ)
    and .10 (ImageNet).  augmentation: keep the weights of EDM's augmentation labels; sampling and
    reflow never give such labels.  Raises FlowkitError that names what is missing, left over or
    misshapen.
    """
    from flowkit import convert_state
    from flowkit.convert_names import edm_config, edm_sources
    from flowkit.nets import ADM, NCSNpp

    state = convert_state.unwrapped(convert_state.flat(convert_state.read_state(source)))
    if not augmentation:
        state.pop("map_augment.weight", None)
    config = edm_config(state)
    net: NCSNpp | ADM = (ADM if config.pop("class") == "ADM" else NCSNpp)(**config, dropout=dropout)
    state = {key: value for key, value in state.items() if not key.endswith("resample_filter")}
    convert_state.fold_labels(state)
    convert_state.fill(net, state, edm_sources(net))
    return net


def load_score_sde(
    source: str | Path | Mapping[str, Any],
    sample_size: int,
    *,
    ema: bool = True,
    resample_filter: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> NCSNpp:
    """The network of a score_sde checkpoint (yang-song/score_sde_pytorch, gnobitab/RectifiedFlow).

    source: a file or its contents, {"model", "ema", ...} or a bare state dict.  sample_size: H = W
    of its pictures.  ema: take the averaged weights where the file has them.  resample_filter:
    null for (1, 3, 3, 1) in a network with Fourier features and (1, 1) in others, as published.
    The factor 1 / sigma of nets trained with `scale_by_sigma`, and 2 x - 1 before nets trained
    with `centered = False`, are not part of the network.
    """
    from flowkit import convert_state
    from flowkit.convert_names import score_sde_config, score_sde_sources
    from flowkit.nets import NCSNpp

    found = convert_state.read_state(source)
    average = ema and isinstance(found.get("ema"), Mapping) and "shadow_params" in found["ema"]
    named = convert_state.averaged(found) if average else convert_state.flat(found)
    state = convert_state.unwrapped(named)
    state.pop("sigmas", None)  # a buffer that the network itself does not use
    config = score_sde_config(state, sample_size)
    halvings = len(config["channel_mult"]) - 1
    if sample_size < 1 or sample_size % 2**halvings:
        raise FlowkitError(
            f"sample_size {sample_size} cannot be halved {halvings} times, as this network does; "
            "give the height of its training pictures"
        )
    if resample_filter is not None:
        config["resample_filter"] = resample_filter
    net = NCSNpp(**config, dropout=dropout)
    convert_state.fill(net, state, score_sde_sources(net))
    return net


def main(argv: Sequence[str] | None = None) -> None:
    """The command: a checkpoint in, a folder that from_pretrained and from_diffusers read out.

    argv: the arguments, those of the process if None.  What the user can mend ends in one line on
    stderr and exit code 1.
    """
    run_command(lambda: _convert(_parser().parse_args(argv)))


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str) -> NoReturn:
        raise FlowkitError(f"{message}; see {self.prog} --help")


# The noise that each preconditioning was trained with, for pictures in [-1, 1]: EDM's own; the VP
# SDE's at s = 1e-5 and 1; twice score_sde's .01 and 50, which are for pictures in [0, 1].
_SIGMAS = {"edm": (0.002, 80.0), "vp": (0.001, 152.0), "ve": (0.02, 100.0)}
_TRAINED_AS = ("rectified-flow", "vp-sde", "ve-sde")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flowkit.convert",
        description="Make a flow of a published checkpoint: OUT_DIR is what teacher=OUT_DIR and "
        "from_diffusers(OUT_DIR) read.",
        epilog="A pickled network, such as EDM's .pkl, is not opened: in the repository that it "
        "comes from, safetensors.torch.save_file(net.state_dict(), 'net.safetensors').",
    )
    commands = parser.add_subparsers(required=True, metavar="edm|score_sde")
    edm = _command(commands, "edm", _edm_velocity, "NVlabs/edm: DDPM++, NCSN++ and ADM networks")
    edm.add_argument(
        "--kind",
        choices=tuple(_SIGMAS),
        default="edm",
        help="the preconditioning, which the weights do not tell: edm (default) for edm-*.pkl and "
        "for rfpp's weights, vp and ve for baseline-*-vp.pkl and baseline-*-ve.pkl",
    )
    ranges = ", ".join(f"{kind} {low:g} to {high:g}" for kind, (low, high) in _SIGMAS.items())
    text = f"trained range of sigma; default: {ranges}. rfpp's own flows: 1e-5 to 99999"
    edm.add_argument("--sigma-min", type=float, metavar="S", help=text)
    edm.add_argument("--sigma-max", type=float, metavar="S", help="see --sigma-min")
    name = "yang-song/score_sde_pytorch, gnobitab/RectifiedFlow and SlimFlow: NCSN++, DDPM++"
    sde = _command(commands, "score_sde", _score_sde_velocity, name)
    sde.add_argument("--sample-size", type=int, required=True, help="height of its pictures")
    sde.add_argument(
        "--trained-as",
        choices=_TRAINED_AS,
        help="what it predicts, which the weights do not tell, and of which the wrong choice makes "
        "no error but noise: rectified-flow (default), vp-sde, or ve-sde, which networks with "
        "Fourier features are",
    )
    sde.add_argument(
        "--no-ema", action="store_true", help="take the weights, not their running average"
    )
    return parser


def _command(
    commands: Any, name: str, build: Callable[[argparse.Namespace], VelocityModel], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("file", metavar="FILE", help="a .safetensors, or a .pth of tensors only")
    command.add_argument("folder", metavar="OUT_DIR", help="a folder that is not there yet")
    command.set_defaults(build=build)
    return command


def _edm_velocity(options: argparse.Namespace) -> VelocityModel:
    from flowkit.diffusion_adapters import PreconditionedVelocity

    low, high = _SIGMAS[options.kind]
    low = low if options.sigma_min is None else options.sigma_min
    high = high if options.sigma_max is None else options.sigma_max
    if not 0 < low < high:
        raise FlowkitError(f"sigma must have a range above 0, got {low:g} to {high:g}")
    # A layer that never gets a gradient stops DistributedDataParallel.
    net: Any = load_edm(options.file, augmentation=False)
    return PreconditionedVelocity(net, kind=options.kind, sigma_min=low, sigma_max=high)


def _score_sde_velocity(options: argparse.Namespace) -> VelocityModel:
    from flowkit.diffusion_adapters import PreconditionedVelocity, VPLinearVelocity
    from flowkit.flow_adapters import FlowVelocity

    net: Any = load_score_sde(options.file, options.sample_size, ema=not options.no_ema)
    fourier = net.config.embedding == "fourier"
    trained_as = options.trained_as or ("ve-sde" if fourier else "rectified-flow")
    if fourier != (trained_as == "ve-sde"):
        features = "has Fourier features of log sigma" if fourier else "has no Fourier features"
        raise FlowkitError(
            f"this network {features}, so it was not trained as {trained_as}; "
            f"choose --trained-as {'ve-sde' if fourier else 'rectified-flow or vp-sde'}"
        )
    if trained_as == "ve-sde":
        low, high = _SIGMAS["ve"]
        return PreconditionedVelocity(net, kind="ve", sigma_min=low, sigma_max=high)
    if trained_as == "vp-sde":
        return VPLinearVelocity(net)
    return FlowVelocity(net, time_scale=999.0)


def _convert(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FlowkitError(f"{folder} is there already; give a folder that is not, or remove it")
    velocity = options.build(options)
    from flowkit.checkpoint import export_model

    net: Any = velocity.net
    shape = [net.config.in_channels, net.config.sample_size, net.config.sample_size]
    classes = net.config.num_classes
    card = (
        f"Weights of {Path(options.file).name}, converted by flowkit; the licence is theirs.\n\n"
        "```python\nfrom flowkit.adapters import from_diffusers\n\n"
        'velocity = from_diffusers("this/folder")\n```\n'
    )
    export_model(velocity, folder, shape=shape, num_classes=classes, card=card)
    made = ", ".join(f"{key} {value}" for key, value in velocity.description().items())
    print(
        f"{folder}: {type(net).__name__} with {net.num_parameters():,} parameters for pictures "
        f"{tuple(shape)}{f' of {classes} classes' if classes else ''}; {made}"
    )


if __name__ == "__main__":
    main()
