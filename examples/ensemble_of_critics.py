"""An ensemble of critics: a policy learns from the most pessimistic of ten value functions.

    python examples/ensemble_of_critics.py

A critic Q(s, a) estimates the return of action a in state s. A policy that maximizes one critic finds the actions that
the critic overrates. Methods such as TD3, SAC, REDQ and SAC-N therefore train several critics and trust the smallest
estimate. The critics are small networks of one shape, so they are one ``MLPEnsemble``: its output is [E, B, 1] for
states and actions [B, 2].

Three parts of such a method use the ensemble in three ways.

1. *The critics' step.* Each critic regresses towards its targets, which are numbers: nothing is backpropagated through
   them. The critics' losses are independent, so ``TrainStep`` trains all critics in one call. Targets [B, 1] are shared
   by all critics, as here. Targets of each critic's own are [E, B, 1], for example bootstrapped from its own target
   network, and X [E, B, 2] gives each critic a batch of its own.
2. *The policy's step.* The policy maximizes the minimum over members of Q(s, policy(s)). The minimum combines members,
   and the gradient flows through the critics into the policy. That is what autograd is for: the ensemble is a module,
   and its forward pass is one node of the tape. A loss of the critics that combines members (a penalty for critics that
   agree too much, say) is trained like this too, with any optimizer of torch.optim.
3. *The target networks* are a copy of the ensemble that follows slowly: one ``lerp_`` per parameter moves all members.

The task is so simple that its solution is known. A point s moves to s + a/2, which costs s^2 + a^2/2, and costs are
discounted. The best policy is linear, a = -K s, with K from a Riccati equation. The example learns from random actions
only, and ends with a check: the learned policy's costs are within 10 % of the best policy's costs.
"""

from __future__ import annotations

import copy

import torch

import fastmlp

CRITICS, STEPS, BATCH = 10, 400, 128
DISCOUNT, PULL, ACTION_COST = 0.9, 0.5, 0.5


def move(s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state and the reward."""
    return s + PULL * a, -(s.square() + ACTION_COST * a.square())


def best_gain() -> float:
    """K of the best policy a = -K s: the fixed point of the scalar Riccati equation."""
    p = k = 0.0
    for _ in range(200):
        k = DISCOUNT * PULL * p / (ACTION_COST + DISCOUNT * PULL**2 * p)
        p = 1 + ACTION_COST * k**2 + DISCOUNT * p * (1 - PULL * k) ** 2
    return k


class Policy(torch.nn.Module):
    """a = tanh(f(s)), so that actions lie between -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.f = fastmlp.MLP((1, 32, 1), "silu")

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        """[B, 1] to [B, 1]."""
        return torch.tanh(self.f(s))


def costs(policy: object, starts: torch.Tensor) -> float:
    """The discounted costs of a policy, mean over starting states."""
    s, total = starts, torch.zeros_like(starts)
    for time in range(60):
        s, reward = move(s, policy(s))  # type: ignore[operator]
        total -= DISCOUNT**time * reward
    return total.mean().item()


def main() -> dict[str, float]:
    """Train the critics and the policy, print and check the costs; returns the costs by policy."""
    torch.manual_seed(0)
    # What was seen of the world: random actions in random states.
    s, a = 2.4 * torch.rand(4096, 1) - 1.2, 2 * torch.rand(4096, 1) - 1
    seen, (s_next, reward) = torch.cat([s, a], 1), move(s, a)

    policy, critics = Policy(), fastmlp.MLPEnsemble((2, 32, 32, 1), CRITICS, "silu")
    targets = copy.deepcopy(critics).requires_grad_(False)
    critics_step = fastmlp.TrainStep(critics, "adamw", lr=0.01, loss="mse")
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(STEPS):
        rows = torch.randint(0, seen.shape[0], (BATCH,))

        # 1. The critics' step: one call, [E] losses.
        with torch.no_grad():
            following = torch.cat([s_next[rows], policy(s_next[rows])], 1)
            smallest = targets(following).amin(0)  # [E, B, 1] -> [B, 1]
        critics_step(seen[rows], reward[rows] + DISCOUNT * smallest)

        # 2. The policy's step: the minimum over members is backpropagated. Only the policy's gradients are asked for,
        #    so those of the critics' parameters are not computed.
        q = critics(torch.cat([s[rows], policy(s[rows])], 1))
        loss = -q.amin(0).mean()
        for p, grad in zip(policy.parameters(), torch.autograd.grad(loss, list(policy.parameters())), strict=True):
            p.grad = grad
        optimizer.step()

        # 3. The target networks follow.
        with torch.no_grad():
            for slow, fast in zip(targets.parameters(), critics.parameters(), strict=True):
                slow.lerp_(fast, 0.05)

    gain, starts = best_gain(), torch.linspace(-1, 1, 101).unsqueeze(1)
    with torch.no_grad():
        found = {
            "no action": costs(torch.zeros_like, starts),
            "learned": costs(policy, starts),
            "best": costs(lambda s: -gain * s, starts),
        }
        q = critics(torch.cat([starts, policy(starts)], 1))
    print(f"{CRITICS} critics 2-32-32-1, {STEPS} steps; discounted costs, mean over starting states:")
    for name, value in found.items():
        print(f"{name:>10}: {value:.4f}")
    print(f"estimate of the learned policy's costs: {-q.mean():.4f} (mean), {-q.amin(0).mean():.4f} (most pessimistic)")
    if found["learned"] > 1.1 * found["best"]:
        raise SystemExit("the policy did not come within 10 % of the best one")
    return found


if __name__ == "__main__":
    main()
