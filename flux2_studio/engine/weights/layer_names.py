"""The names of the transformer's layers: Black Forest Labs', which we use, and diffusers' equivalents.

Data only, for full checkpoints (`layouts.py`) and for LoRAs (`lora/keys.py`). Names of layers in blocks omit the
block's name. `DOUBLE_BLOCK_PARTS` lists, in order, the separate diffusers matrices that form one of ours.
"""

TOP_LEVEL_NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",  # (shift, scale) here, (scale, shift) there
}
DOUBLE_BLOCK_NAMES = {
    "img_attn.qkv": "attn.to_qkv",
    "txt_attn.qkv": "attn.to_added_qkv",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
DOUBLE_BLOCK_PARTS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_BLOCK_NAMES = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
