"""The minimal core, in the order of the data flow: sample, conversation, media, batch, policy,
forward, rollout."""
