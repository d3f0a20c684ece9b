import json
from torchvision.utils import save_image
import torch
def write_grid(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat(list(columns.values()))*.5+.5, path, nrow=64)
def summary_markdown(s): return json.dumps(s, indent=1)
