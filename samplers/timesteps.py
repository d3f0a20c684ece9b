import torch, math
class TimeDensity: pass
class Uniform(TimeDensity):
    def sample(self, n, *, generator=None, device=None): return torch.rand(n, generator=generator, device=device)
class UShaped(TimeDensity):
    def __init__(self, a=4.0): self.a = a
    def sample(self, n, *, generator=None, device=None):
        u = torch.rand(2, n, generator=generator, device=device)
        s = torch.log1p(u[0] * math.expm1(self.a)) / self.a
        return torch.where(u[1] < .5, s, 1 - s) * (1 - 2e-5) + 1e-5
class Constant(TimeDensity):
    def __init__(self, t): self.t = t
    def sample(self, n, *, generator=None, device=None): return torch.full((n,), self.t, device=device)
def density(name, **o): return {"uniform": Uniform, "u_shaped": UShaped, "constant": Constant}[name](**o)
