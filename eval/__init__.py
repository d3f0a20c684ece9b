import torch
from types import SimpleNamespace
import numpy as np
class FrechetMoments:
    def __init__(self): self.x = []
    def update(self, f): self.x.append(f.double())
def frechet_distance(a, b):
    x, y = torch.cat(a.x), torch.cat(b.x)
    s1, s2 = x.T.cov(), y.T.cov()
    w, q = torch.linalg.eigh(s1); r = q * w.clamp(min=0).sqrt() @ q.T
    return float((x.mean(0)-y.mean(0)).square().sum() + s1.trace() + s2.trace() - 2*torch.linalg.eigvalsh(r@s2@r).clamp(min=0).sqrt().sum())
def load_extractor(name, weights=None, device=None):
    f = lambda p: p.flatten(1)
    f.id = "pixels"
    return f
def straightness(velocity, noise, num_steps=100):
    from flowkit.samplers import sample
    x, tot = noise, 0
    with torch.no_grad():
        for i in range(num_steps):
            v = velocity(x, i/num_steps); tot = tot + v.square().flatten(1).mean(1)/num_steps; x = x + v/num_steps
    return SimpleNamespace(per_dim=float((tot - (x-noise).square().flatten(1).mean(1)).mean()))
def few_step_distances(model, shape, *, nfe, num_samples, seed, extractor, reference, cond=None, chunk_size=500, solver="euler", device="cpu", decode=None, progress=None):
    from flowkit.samplers import sample; from flowkit.noise import keyed_noise
    out = []
    for n in nfe:
        m = FrechetMoments()
        for s in range(0, num_samples, chunk_size):
            r = range(s, min(s+chunk_size, num_samples))
            with torch.no_grad(): x = sample(model(r), keyed_noise(seed, r, shape), [i/n for i in range(n+1)]).x
            m.update(extractor(x.clamp(-1,1))); progress(len(r))
        out.append(frechet_distance(m, reference))
    return out
