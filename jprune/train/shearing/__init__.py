"""LLM-Shearing: Xia et al., 2023, *Sheared LLaMA*, arXiv:2310.06694."""
