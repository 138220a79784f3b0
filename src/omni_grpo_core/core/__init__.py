"""The minimal core, in the order in which data walk it: sample, conversation, media, batch, policy,
forward, rollout."""
