"""A loss of this library in a plain PyTorch loop: a policy of one token learns to say 3."""

import torch

from moe_upgrpo.losses import PolicyLossConfig, finalize_metrics, group_advantages, policy_loss

torch.manual_seed(0)
logits = torch.zeros(8, requires_grad=True)
optimizer = torch.optim.SGD([logits], lr=1.0)
config = PolicyLossConfig.preset("up-grpo")
for step in range(31):
    policy = torch.distributions.Categorical(logits=logits)
    said = policy.sample((64,))
    advantages = group_advantages((said == 3).float(), group_size=64)[:, None]
    log_probs, mask = policy.log_prob(said)[:, None], torch.ones(64, 1)  # [sequences, tokens]
    result = policy_loss(log_probs, log_probs.detach(), advantages, mask, config=config)
    optimizer.zero_grad()
    result.loss.backward()
    optimizer.step()
    if step % 10 == 0:
        kl = finalize_metrics(result.metrics)["ppo_kl"]
        print(f"step {step}: says 3 with {policy.probs[3]:.2f}, kl {kl:.1e}")
