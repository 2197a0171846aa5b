"""Hugging Face transformers' FocalNetModulation."""

from .adapter import Adapter


class Transformers(Adapter):
    form = "transformers"
    f, h, proj = "projection_in", "projection_context", "projection_out"
    act, drop, norm = "activation", "projection_dropout", "layernorm"
    norm_flag = "use_post_layernorm_in_modulation"
