"""What other trainers write to disk by themselves, read as recorded steps: for people who cannot
run ``record`` in their trainer.

``rows``       a completion as a dump has it, and a step of them as a trace
``places``     files and folders of a dump, and the errors of what is in them
``verl``       JSON lines of verl and verl-omni
``trl``        completion tables of TRL
``swift``      ``completions.jsonl`` of ms-swift
``samples``    ``.pt`` files of slime and miles, by ``safe_pt``
``formats``    all of them by name

A dump holds text and rewards, some of them token ids, log-probabilities and advantages. Everything
else is "not in this dump". Each reader's docstring names the published code that its format was
taken from.
"""
