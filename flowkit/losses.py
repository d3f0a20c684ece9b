import torch
from torch import nn
Premetric = nn.Module
class Squared(nn.Module):
    def forward(self, v, x_t, t, batch): return (v - (batch.data - batch.noise)).float().square().flatten(1).mean(1)
class Huber(nn.Module):
    def forward(self, v, x_t, t, batch):
        e = (v - (batch.data - batch.noise)).float().flatten(1); d = e.shape[1]; c = 0.00054 * d
        return ((e.square().sum(1) + c * c).sqrt() - c) / d
def premetric(name, **o): return {"squared": Squared, "huber": Huber}[name]()
