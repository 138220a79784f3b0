"""Qwen2.5-Omni's true token ids, without its weights.

The public package ``dashscope`` (the extra ``qwen``) carries Qwen's byte-pair ranks as a data file.
From these and from published constants ``processor.build_processor`` makes, in a folder of the
user's, the tokenizer and processor that Qwen2.5-Omni checkpoints come with. Nothing of that file is
part of this package, and ``dashscope`` itself is never imported.
"""
