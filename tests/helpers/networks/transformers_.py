"""Networks of transformers."""

import torch
import transformers as hf

from tests.helpers.networks.case import Case, image, text

IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {
    **SMALL,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
}


def _of_pixels(net, x):
    return net(pixel_values=x).last_hidden_state


def _of_embeddings(net, x):
    return net(inputs_embeds=x).last_hidden_state


def _decoded(net, x):
    return net(inputs_embeds=x, use_cache=False).last_hidden_state


def _vision(model, config, call=_of_pixels, size=16):
    return Case(model(config), call, (image(3, size),))


def vit():
    return _vision(hf.ViTModel, hf.ViTConfig(**SMALL, **IMAGE))


def beit():
    config = hf.BeitConfig(**SMALL, **IMAGE, use_relative_position_bias=True, layer_scale_init_value=0.1)
    return _vision(hf.BeitModel, config)


def dinov2():
    config = hf.Dinov2Config(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, **IMAGE, use_swiglu_ffn=True
    )
    return _vision(hf.Dinov2Model, config)


def dinov3():
    return _vision(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**SMALL, **IMAGE))


def siglip():
    return _vision(hf.SiglipVisionModel, hf.SiglipVisionConfig(**SMALL, **IMAGE))


def clip_vision():
    return _vision(hf.CLIPVisionModel, hf.CLIPVisionConfig(**SMALL, **IMAGE))


def _swin(model, config, width):
    made = config(
        image_size=16,
        patch_size=2,
        embed_dim=width,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
    )
    return _vision(model, made)


def swin():
    return _swin(hf.SwinModel, hf.SwinConfig, 8)


def swin_v2():
    return _swin(hf.Swinv2Model, hf.Swinv2Config, 16)


def convnext():
    return _vision(hf.ConvNextModel, hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


def resnet():
    config = hf.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    return _vision(hf.ResNetModel, config, size=32)


def regnet():
    config = hf.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="y"
    )
    return _vision(hf.RegNetModel, config)


def segformer():
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
    )  # fmt: skip
    return _vision(hf.SegformerModel, config)


def mobilevit():
    config = hf.MobileViTConfig(
        image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8], num_attention_heads=2
    )
    case = _vision(hf.MobileViTModel, config, size=32)
    with torch.no_grad():
        for p in case.module.parameters():
            p.mul_(5.0 if p.dim() > 1 else 1.0)  # else its output hardly depends on pixels
    return case


def vit_mae():
    def call(net, x, noise):
        return net(pixel_values=x, noise=noise).last_hidden_state

    case = _vision(hf.ViTMAEModel, hf.ViTMAEConfig(**SMALL, **IMAGE), call)
    case.fixed = (torch.rand(2, 16),)
    return case


def bert():
    return Case(
        hf.BertModel(hf.BertConfig(**SMALL, vocab_size=50), add_pooling_layer=False),
        _of_embeddings,
        (text(16),),
    )


def modern_bert():
    module = hf.ModernBertModel(hf.ModernBertConfig(**SMALL, vocab_size=50, pad_token_id=0))
    return Case(module, _of_embeddings, (text(16),))


def deberta_v2():
    config = hf.DebertaV2Config(
        **SMALL, vocab_size=50, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4
    )
    return Case(hf.DebertaV2Model(config), _of_embeddings, (text(16),))


def gpt2():
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    return Case(hf.GPT2Model(config), _decoded, (text(16),))


def llama():
    return Case(hf.LlamaModel(hf.LlamaConfig(**DECODER)), _decoded, (text(16),))


def mistral():
    return Case(hf.MistralModel(hf.MistralConfig(**DECODER, sliding_window=3)), _decoded, (text(16),))


def mixtral():
    config = hf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return Case(hf.MixtralModel(config), _decoded, (text(16),))


def gemma_2():
    return Case(hf.Gemma2Model(hf.Gemma2Config(**DECODER, sliding_window=3)), _decoded, (text(16),))


def qwen_3():
    return Case(hf.Qwen3Model(hf.Qwen3Config(**DECODER)), _decoded, (text(16),))


def mamba():
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=50)
    return Case(hf.MambaModel(config), _decoded, (text(16),))


def t5_encoder():
    module = hf.T5EncoderModel(
        hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)
    )
    return Case(module, _of_embeddings, (text(16),))


def bart_encoder():
    config = hf.BartConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, vocab_size=50,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    return Case(hf.BartModel(config).encoder, _of_embeddings, (text(16),))


def whisper_encoder():
    config = hf.WhisperConfig(
        num_mel_bins=8, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
        vocab_size=50, max_source_positions=10, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=32, pad_token_id=0,
    )  # fmt: skip
    module = hf.WhisperModel(config).encoder
    return Case(module, lambda net, x: net(x).last_hidden_state, (torch.randn(2, 8, 20),))


def wav2vec2():
    config = hf.Wav2Vec2Config(
        **SMALL, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=20,
    )  # fmt: skip
    return Case(hf.Wav2Vec2Model(config), lambda net, x: net(x).last_hidden_state, (torch.randn(2, 200),))


def encodec():
    config = hf.EncodecConfig(
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
        codebook_dim=8,
        codebook_size=16,
    )
    module = hf.EncodecModel(config)
    return Case(module.encoder, lambda net, x: net(x), (torch.randn(2, 1, 32),))


def perceiver():
    config = hf.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2,
    )  # fmt: skip
    return Case(hf.PerceiverModel(config), lambda net, x: net(inputs=x).last_hidden_state, (text(16),))


TRANSFORMERS = [
    *(
        vit,
        beit,
        dinov2,
        dinov3,
        siglip,
        clip_vision,
        swin,
        swin_v2,
        convnext,
        resnet,
        regnet,
        segformer,
    ),
    *(
        mobilevit,
        vit_mae,
        bert,
        modern_bert,
        deberta_v2,
        gpt2,
        llama,
        mistral,
        mixtral,
        gemma_2,
    ),
    *(
        qwen_3,
        mamba,
        t5_encoder,
        bart_encoder,
        whisper_encoder,
        wav2vec2,
        encodec,
        perceiver,
    ),
]
