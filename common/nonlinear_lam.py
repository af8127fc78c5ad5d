"""MLP latent action models on random nonlinear observations: do they leak where the linear theory says?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MLP_ACTION, MLP_STATE, MLP_OBS = 2, 4, 16  # da = dx = dz, ds, do of the nonlinear check


def mlp(x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """n networks at once: x (n, B, in) -> (n, B, out), tanh between the layers."""
    for weight, bias in layers[:-1]:
        x = torch.tanh(torch.baddbmm(bias, x, weight))
    weight, bias = layers[-1]
    return torch.baddbmm(bias, x, weight)


def random_mlp(n: int, *widths: int) -> list[tuple[Tensor, Tensor]]:
    """Layers of n networks to train."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        weight = torch.randn(n, fan_in, fan_out) / fan_in**0.5
        bias = torch.zeros(n, 1, fan_out)
        layers.append((weight.requires_grad_(), bias.requires_grad_()))
    return layers


@dataclass
class World:
    """n worlds with random nonlinear observations o = f(s, scale xi); xi is drawn anew at every step."""

    f: list[tuple[Tensor, Tensor]]  # layers of a tanh network
    scale: Tensor  # (n, 1, 1)
    clean: Tensor  # (n, 1, 1) bool: the target is f(s, 0)

    def see(self, s: Tensor, xi: Tensor) -> Tensor:
        return mlp(torch.cat([s, self.scale * xi], 2), self.f)

    def sample(self, states: int, repeats: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`repeats` transitions from each state: o, o', the target's o and o', and [a, eta / scale]."""
        n, rows = len(self.scale), states * repeats
        s = torch.randn(n, states, 1, MLP_STATE).expand(-1, -1, repeats, -1).reshape(n, rows, -1)
        xi = torch.randn(n, states, 1, MLP_ACTION).expand(-1, -1, repeats, -1).reshape(n, rows, -1)
        noise = torch.randn(n, rows, 2 * MLP_ACTION)
        a, xi_next = noise[..., :MLP_ACTION], noise[..., MLP_ACTION:]
        s_next = s + torch.nn.functional.pad(0.5 * a, (0, MLP_STATE - MLP_ACTION))
        now, after = self.see(s, xi), self.see(s_next, xi_next)
        target_now = torch.where(self.clean, self.see(s, 0 * xi), now)
        target_next = torch.where(self.clean, self.see(s_next, 0 * xi), after)
        return now, after, target_now, target_next, noise


def infer(idm: list[tuple[Tensor, Tensor]], now: Tensor, after: Tensor) -> Tensor:
    return mlp(torch.cat([now, 2 * (after - now)], 2), idm)


def correlations(z: Tensor, noise: Tensor, states: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared canonical correlations of z, whitened within each state, with a and with eta: (n,) each."""
    z = z.reshape(len(z), states, -1, z.shape[2]).double()
    noise = noise.reshape(len(noise), states, -1, noise.shape[2]).double()
    z_basis = torch.linalg.qr(z - z.mean(2, keepdim=True))[0]
    noise_basis = torch.linalg.qr(noise - noise.mean(2, keepdim=True))[0]
    shared = (z_basis.mT @ noise_basis) ** 2  # (n, states, dz, da + dx)
    with_a = shared[..., :MLP_ACTION].sum((2, 3)) / MLP_ACTION
    with_eta = shared[..., MLP_ACTION:].sum((2, 3)) / MLP_ACTION
    return with_a.mean(1).numpy(), with_eta.mean(1).numpy()


def nonlinear(scales: np.ndarray, seeds: int, updates: int) -> dict[str, np.ndarray]:
    """MLP LAMs on random nonlinear observations, for each background scale and seed: {name: (scales, seeds)}.

    da = dx = dz = 2, ds = 4, 16 observed numbers; f is one random network per seed. linear_leak: that of the
    closed form, innovation PCA of o; leak and r2 are of MLP IDM and FDM trained on o' (raw) or f(s', 0)
    (clean). z's share of o is taken out by holding o fixed: 64 states, 64 (a, eta) each. r2: action explained
    by z, leak: as in linear_lam.measures.
    """
    jobs = [(scale, seed, clean) for scale in scales for seed in range(seeds) for clean in (False, True)]
    n = len(jobs)
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    f = []
    for fan_in, fan_out in ((MLP_STATE + MLP_ACTION, 32), (32, MLP_OBS)):
        drawn = [rng.standard_normal((fan_in, fan_out)).astype(np.float32) / fan_in**0.5 for rng in rngs]
        weight = np.stack([drawn[seed] for _, seed, _ in jobs])
        f.append((torch.from_numpy(weight), torch.zeros(n, 1, fan_out)))
    scale = torch.tensor([scale for scale, _, _ in jobs], dtype=torch.float32)
    clean = torch.tensor([clean for _, _, clean in jobs])
    world = World(f, scale[:, None, None], clean[:, None, None])

    torch.manual_seed(0)
    idm = random_mlp(n, 2 * MLP_OBS, 64, 64, MLP_ACTION)
    fdm = random_mlp(n, MLP_OBS + MLP_ACTION, 64, 64, MLP_OBS)
    optimiser = torch.optim.Adam([weight for layer in idm + fdm for weight in layer], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for _ in range(updates):
        now, after, target_now, target_next, _ = world.sample(states=128, repeats=1)
        z = infer(idm, now, after)
        prediction = mlp(torch.cat([target_now, z], 2), fdm)
        error = (prediction - (target_next - target_now)) ** 2
        loss = error.mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    with torch.no_grad():
        now, after, _, _, noise = world.sample(states=64, repeats=64)
        r2, leak = correlations(infer(idm, now, after), noise, states=64)
        past, future, *_ = world.sample(states=4096, repeats=1)
        past = past.double() - past.double().mean(1, keepdim=True)
        future = future.double() - future.double().mean(1, keepdim=True)
        innovation = future - past @ torch.linalg.lstsq(past, future).solution
        leading = torch.linalg.eigh(innovation.mT @ innovation)[1][..., -MLP_ACTION:]
        _, linear_leak = correlations(after.double() @ leading, noise, states=64)
    shape = (len(scales), seeds, 2)  # raw, clean
    return {
        "linear_leak": linear_leak.reshape(shape)[..., 0],
        "leak_raw": leak.reshape(shape)[..., 0],
        "leak_clean": leak.reshape(shape)[..., 1],
        "r2_clean": r2.reshape(shape)[..., 1],
    }
