"""Networks of diffusers."""

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina, get_3d_rotary_pos_embed_allegro

from tests.helpers.networks.case import TEXT, Case, image, text, time


def dit():
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )

    def call(net, z, t, labels):
        return net(z, timestep=t, class_labels=labels).sample

    return Case(module, call, (image(), time()), (torch.arange(2),))


def pixart():
    module = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, sample_size=8,
        caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip

    def call(net, z, t, words, mask):
        return net(
            z,
            words,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
        ).sample

    return Case(module, call, (image(), time()), (text(12), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])))


def sd3():
    module = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip

    def call(net, z, t, words, pooled):
        return net(z, words, pooled, t).sample

    return Case(module, call, (image(), time()), (text(12), torch.randn(2, 10)))


def _ids(side=4):
    positions = torch.arange(float(side))
    return torch.cartesian_prod(torch.zeros(1), positions, positions), torch.zeros(TEXT, 3)


def flux():
    module = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip

    def call(net, z, t, guidance, words, pooled, ids, text_ids):
        return net(z, words, pooled, t, ids, text_ids, guidance).sample

    return Case(module, call, (text(4, 16), time(1e-3), time(1e-3)), (text(12), torch.randn(2, 10), *_ids()))


def flux_2():
    module = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip

    def call(net, z, t, guidance, words, ids, text_ids):
        return net(z, words, t, ids, text_ids, guidance).sample

    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
    return Case(
        module,
        call,
        (text(4, 16), time(1e-3), time(1e-3)),
        (text(12), ids[None].expand(2, -1, -1), torch.zeros(2, TEXT, 4)),
    )


def chroma():
    module = diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip

    def call(net, z, t, words, ids, text_ids):
        return net(z, words, t, ids, text_ids).sample

    return Case(module, call, (text(4, 16), time(1e-3)), (text(12), *_ids()))


def bria():
    module = diffusers.BriaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip

    def call(net, z, t, words, ids, text_ids):
        return net(z, words, None, t, ids, text_ids).sample

    return Case(module, call, (text(4, 16), time(1e-3)), (text(12), *_ids()))


def unet_2d():
    module = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return Case(module, lambda net, z, t: net(z, t).sample, (image(), time()))


def unet_2d_condition():
    module = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (image(), time()), (text(12),))


def unet_1d():
    module = diffusers.UNet1DModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(16, 16, 32),
        time_embedding_type="positional", act_fn="silu", use_timestep_embedding=True,
        out_block_type="OutConv1DBlock", norm_num_groups=4, layers_per_block=1,
        mid_block_type="MidResTemporalBlock1D",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D", "UpResnetBlock1D"),
    )  # fmt: skip
    return Case(module, lambda net, z, t: net(z, t).sample, (torch.randn(2, 4, 64), time()))


def unet_3d():
    module = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(12),))


def unet_cascade():
    module = diffusers.models.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=12, dropout=(0.0, 0.0),
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (image(), time()), (text(12, 1),))


def uvit_2d():
    module = diffusers.models.UVit2DModel(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=12, vocab_size=20, codebook_size=16, in_channels=16, block_out_channels=16,
        num_hidden_layers=1, num_attention_heads=2, block_num_heads=2, intermediate_size=32, sample_size=4,
    )  # fmt: skip

    def call(net, words, pooled, micro, ids):
        return net(ids, words, pooled, micro)

    return Case(
        module, call, (text(12), torch.randn(2, 16), torch.rand(2, 5)), (torch.randint(16, (2, 4, 4)),)
    )


def hunyuan_dit():
    module = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=16, num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=10, text_len=TEXT, text_len_t5=TEXT, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip

    def call(net, z, t, words, words_t5, cos, sin):
        mask = torch.ones(2, TEXT)
        return net(
            z, t, encoder_hidden_states=words, text_embedding_mask=mask, encoder_hidden_states_t5=words_t5,
            text_embedding_mask_t5=mask, image_rotary_emb=(cos, sin),
        ).sample  # fmt: skip

    angle = torch.rand(16, 8)
    return Case(module, call, (image(), time()), (text(12), text(16), angle.cos(), angle.sin()))


def aura_flow():
    module = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, words, t).sample

    return Case(module, call, (image(), time(1e-3)), (text(12),))


def cogvideox():
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
        max_text_seq_length=TEXT,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, words, t).sample

    return Case(module, call, (torch.randn(2, 2, 4, 8, 8), time()), (text(12),))


def cogview_3():
    module = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=12, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip

    def call(net, z, t, words, size, crop):
        return net(z, words, t, size, size, crop).sample

    return Case(module, call, (image(), time()), (text(12), torch.full((2, 2), 8.0), torch.zeros(2, 2)))


def cogview_4():
    module = diffusers.CogView4Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=12, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        rope_axes_dim=(8, 8),
    )  # fmt: skip

    def call(net, z, t, words, size, crop):
        return net(z, words, t, size, size, crop).sample

    return Case(module, call, (image(), time()), (text(12), torch.full((2, 2), 8.0), torch.zeros(2, 2)))


def latte():
    module = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12, video_length=2,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(12),))


def lumina():
    module = diffusers.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=4,
        cross_attention_dim=12,
    )  # fmt: skip
    rotary = get_2d_rotary_pos_embed_lumina(8, 384, 384)

    def call(net, z, t, words):
        return net(z, t, words, torch.ones(2, TEXT), rotary, cross_attention_kwargs={}).sample

    return Case(module, call, (image(), time()), (text(12),))


def lumina_2():
    module = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16),
        cap_feat_dim=12,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words, torch.ones(2, TEXT, dtype=torch.bool)).sample

    return Case(module, call, (image(), time()), (text(12),))


def sana():
    module = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, words, t).sample

    return Case(module, call, (image(), time()), (text(12),))


def allegro():
    module = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_height=8,
        sample_width=8, sample_frames=2, caption_channels=12,
    )  # fmt: skip
    found = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2
    )
    places = torch.cartesian_prod(*(x.long() for x in found[3:])).T.reshape(3, 1, -1)
    rotary = found[:3], tuple(places)

    def call(net, z, t, words):
        return net(z, words, t, torch.ones(2, 2, 8, 8), torch.ones(2, TEXT), rotary).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(12),))


def mochi():
    module = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=TEXT,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, words, t, torch.ones(2, TEXT, dtype=torch.bool)).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(16),))


def ltx_video():
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, words, t, torch.ones(2, TEXT), num_frames=2, height=4, width=4).sample

    return Case(module, call, (text(4, 32), time()), (text(12),))


def stable_audio():
    module = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=12, cross_attention_input_dim=12,
    )  # fmt: skip

    def call(net, z, t, words, pooled, cos, sin):
        return net(z, t, words, pooled, (cos, sin)).sample

    angle = torch.rand(17, 4)
    fixed = text(12), text(12, 1), angle.cos(), angle.sin()
    return Case(module, call, (torch.randn(2, 4, 16), time()), fixed)


def prior():
    module = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=TEXT
    )

    def call(net, z, t, projected, words):
        return net(z, t, projected, words).predicted_image_embedding

    return Case(module, call, (torch.randn(2, 12), time()), (torch.randn(2, 12), text(12)))


def t5_film():
    module = diffusers.models.T5FilmDecoder(
        input_dims=8, targets_length=10, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32
    )

    def call(net, z, t, words):
        return net([(words, torch.ones(2, TEXT))], z, t)

    return Case(module, call, (text(8, 10), time()), (text(16),))


def hunyuan_video():
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip

    def call(net, z, t, guidance, words, pooled):
        return net(z, t, words, torch.ones(2, TEXT), pooled, guidance).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time(), time()), (text(12), torch.randn(2, 10)))


def wan():
    module = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(12),))


def omnigen():
    module = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=1,
        pad_token_id=0, vocab_size=50, rope_base=100,
        rope_scaling={"long_factor": [1] * 4, "short_factor": [1] * 4}, pos_embed_max_size=8,
        time_step_dim=16,
    )  # fmt: skip

    def call(net, z, t, ids, places, mask):
        return net(z, t, ids, [], {}, mask, places).sample

    length = TEXT + 1 + 16
    places = torch.arange(length)[None].expand(2, -1)
    return Case(
        module, call, (image(), time()), (torch.randint(50, (2, TEXT)), places, torch.ones(2, length, length))
    )


def cosmos():
    module = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        mlp_ratio=2, text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, words, fps=30).sample

    return Case(module, call, (torch.randn(1, 4, 2, 8, 8), time(batch=1)), (text(12, batch=1),))


def qwen_image():
    module = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def call(net, z, t, words):
        mask = torch.ones(2, TEXT, dtype=torch.bool)
        return net(z, words, mask, t, img_shapes=[[(1, 4, 4)]] * 2).sample

    return Case(module, call, (text(4, 16), time(1e-3)), (text(12),))


def easy_animate():
    module = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, mmdit_layers=1, patch_size=2, sample_width=8, sample_height=8,
        time_position_encoding_type="3d_rope", add_norm_text_encoder=True,
    )  # fmt: skip

    def call(net, z, t, words):
        return net(z, t, encoder_hidden_states=words).sample

    return Case(module, call, (torch.randn(2, 4, 2, 8, 8), time()), (text(12),))


def prx():
    module = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )

    def call(net, z, t, words):
        return net(z, t, words).sample

    return Case(module, call, (image(), time(1e-3)), (text(12),))


def z_image():
    module = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 4, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip

    def call(net, z, t, words):
        return torch.stack(net(list(z.unbind(0)), t, list(words.unbind(0))).sample)

    return Case(module, call, (torch.randn(2, 4, 1, 8, 8), time(1e-3)), (text(12),))


def controlnet():
    module = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 4),
    )  # fmt: skip

    def call(net, z, t, words, picture):
        out = net(z, t, words, picture)
        return torch.cat([x.flatten(1) for x in (*out.down_block_res_samples, out.mid_block_res_sample)], 1)

    return Case(module, call, (image(), time()), (text(12), image(3, 16)))


def transformer_2d():
    module = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=12, sample_size=8,
    )  # fmt: skip

    def call(net, z, words):
        return net(z, words).sample

    return Case(module, call, (image(8),), (text(12),))


def autoencoder_kl():
    module = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return Case(module, lambda net, x: net(x).sample, (image(3),))


def autoencoder_dc():
    module = diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    )  # fmt: skip
    return Case(module, lambda net, x: net(x).sample, (image(3, 16),))


def tiny_decoder():
    module = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    return Case(module.decoder, lambda net, z: net(z), (image(),))


def autoencoder_oobleck():
    module = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=4,
        decoder_input_channels=2,
    )  # fmt: skip
    return Case(module, lambda net, x: net(x).sample, (torch.randn(2, 2, 32),))


def autoencoder_wan():
    module = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return Case(module, lambda net, x: net(x).sample, (torch.randn(1, 3, 5, 16, 16),))


def vq_model():
    module = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=4)
    torch.nn.init.normal_(
        module.quantize.embedding.weight
    )  # far apart, so that rounding chooses no other one
    return Case(module, lambda net, x: net(x).sample, (image(3),))


DIFFUSERS = [
    *(dit, pixart, sd3, flux, flux_2, chroma, bria, unet_2d, unet_2d_condition, unet_1d, unet_3d),
    *(unet_cascade, uvit_2d, hunyuan_dit, aura_flow, cogvideox, cogview_3),
    *(cogview_4, latte, lumina, lumina_2, sana, allegro, mochi, ltx_video, stable_audio, prior, t5_film),
    *(
        hunyuan_video,
        wan,
        omnigen,
        cosmos,
        qwen_image,
        easy_animate,
        prx,
        z_image,
        controlnet,
        transformer_2d,
    ),
    *(autoencoder_kl, autoencoder_dc, tiny_decoder, autoencoder_oobleck, autoencoder_wan, vq_model),
]
