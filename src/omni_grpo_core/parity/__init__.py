"""Do two input paths give the model the same? One row at a time, from text to positions.

``given``       what every path gets: a row's conversation, prompt and decoded media
``paths``       the paths, a small file each, in which alone a foreign library is imported
``seen``        what a path made of a row, as a :class:`~omni_grpo_core.types.Trace`
``run``         a path over all rows: here, in another Python, or from stored traces
``compare``     two paths, row by row: the first stage and token at which they differ
``layout``      a prompt as text and media; ``ids_causes`` and ``media_causes`` change one side
                until it is the other: the cause, proved
``definition``  what the model's own definition says about the order of the tokens, by which
                ``right`` decides between two sides
"""
