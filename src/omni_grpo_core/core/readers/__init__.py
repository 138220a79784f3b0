"""Row formats: one small file each, all behind :class:`~omni_grpo_core.core.readers.row.Format`."""
