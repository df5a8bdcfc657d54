"""A SAM3 of about 5 M parameters, made of the official classes, for demos and tests on a CPU."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.cpu import enable_cpu, provide_triton
from sam3_lora.base.text import fill_uninitialised
from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.errors import CheckpointError

provide_triton()

from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer  # noqa: E402
from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer  # noqa: E402
from sam3.model.geometry_encoders import SequenceGeometryEncoder  # noqa: E402
from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead  # noqa: E402
from sam3.model.model_misc import (  # noqa: E402
    MLP,
    DotProductScoring,
    MultiheadAttentionWrapper,
    TransformerWrapper,
)
from sam3.model.necks import Sam3DualViTDetNeck  # noqa: E402
from sam3.model.position_encoding import PositionEmbeddingSine  # noqa: E402
from sam3.model.sam3_image import Sam3Image  # noqa: E402
from sam3.model.text_encoder_ve import VETextEncoder  # noqa: E402
from sam3.model.tokenizer_ve import SimpleTokenizer  # noqa: E402
from sam3.model.vitdet import ViT  # noqa: E402
from sam3.model.vl_combiner import SAM3VLBackbone  # noqa: E402
from sam3.train.matcher import BinaryHungarianMatcherV2  # noqa: E402

WEIGHTS_FILE = "tiny_sam3.safetensors"
WEIGHTS_SHA256 = "db2d0a6832fc74c9db0524a62f6b16b1a180d875b52e23c446f5dc3017810a06"

_PATCH = 14
_VIT_WIDTH = 96
_WIDTH = 64  # of the DETR parts; PixelDecoder's GroupNorm(8) asks for a multiple of 8
_HEADS = 4
_FFN_WIDTH = 256
_TEXT_WIDTH = 64
_VOCABULARY = 49408
_EMBEDDING = "backbone.language_backbone.encoder.token_embedding.weight"
_EMBEDDING_SEED = 20251119
EMBEDDING_SHA256 = "73c9f7e79260278f7b6d9d0abbe2dc58785b8c2a86c244f9f4fbe9c267cf8f8c"


def build_tiny_sam3(seed: int = 0, eval_mode: bool = False, dropout: float = 0.0) -> Sam3Image:
    """Build the tiny model with the initial values that let it learn from scratch, on the CPU.

    Args:
        seed: Seed of the initial values. The global random state of torch is left as it was.
        eval_mode: Return the model in eval mode. The matcher of the official training code is there either way.
        dropout: Dropout and DropPath rate of all parts; the full-size model uses 0.1.
    """
    enable_cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam3Image(
            backbone=SAM3VLBackbone(visual=_vision_encoder(dropout), text=_text_encoder(), scalp=1),
            transformer=_transformer(dropout),
            input_geometry_encoder=_geometry_encoder(dropout),
            segmentation_head=_segmentation_head(),
            dot_prod_scoring=_scoring(dropout),
            num_feature_levels=1,
            o2m_mask_predict=True,
            use_instance_query=False,
            multimask_output=True,
            inst_interactive_predictor=None,
            matcher=BinaryHungarianMatcherV2(
                focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
            ),
        )
    return model.train(not eval_mode)


def load_tiny_sam3(path: Path | None = None, eval_mode: bool = True) -> Sam3Image:
    """Return the tiny model with its pretrained weights, fp32, on the CPU.

    Args:
        path: A weights file written by :func:`save_tiny_sam3`; ``None`` takes the one inside the package.
        eval_mode: Return the model in eval mode.

    Raises:
        CheckpointError: If the file is missing, damaged, or not of this architecture.
    """
    tensors = _read_weights(packaged_weights(), WEIGHTS_SHA256) if path is None else _read_weights(path)
    model = build_tiny_sam3(eval_mode=eval_mode)
    _check_digest(
        model.get_parameter(_EMBEDDING).detach().numpy().tobytes(), EMBEDDING_SHA256, "the token table"
    )
    result = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    missing = [name for name in result.missing_keys if not _is_derived(name)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{path or WEIGHTS_FILE} is not a tiny SAM3 of this version: "
            f"missing {missing}, unexpected {result.unexpected_keys}"
        )
    return model


def packaged_weights() -> Path:
    """Return the path of the weights file inside the installed package."""
    return Path(str(files("sam3_lora.base"))) / WEIGHTS_FILE


def save_tiny_sam3(model: Sam3Image, path: Path) -> str:
    """Write the weights as fp16 safetensors, without what is derived or seeded, and return the file's SHA-256."""
    tensors = {n: t.half().contiguous() for n, t in model.state_dict().items() if not _is_derived(n)}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seeded_token_embedding(rows: int = _VOCABULARY, width: int = _TEXT_WIDTH) -> Tensor:
    """Return the frozen token table ``(rows, width)``, fp32, with the same bits on every machine and version.

    Every value is a sum of four random bytes, centred, over 128: close to a normal distribution of deviation 1.15,
    and exact in fp32. ``RandomState`` has a frozen stream, which numpy's newer generators do not promise.
    """
    raw = np.frombuffer(np.random.RandomState(_EMBEDDING_SEED).bytes(rows * width * 4), dtype=np.uint8)
    total = raw.reshape(rows, width, 4).sum(axis=2, dtype=np.int32)
    return torch.from_numpy((total - 510).astype(np.float32) / 128)


def _read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"the weights of the tiny SAM3 are not at {str(path)!r}; reinstall sam3-lora")
    if sha256 is not None:
        _check_digest(path.read_bytes(), sha256, repr(str(path)))
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _check_digest(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{what} is damaged: its SHA-256 is {found}, expected {sha256}; reinstall sam3-lora"
        )


def _is_derived(name: str) -> bool:
    """Whether a tensor follows from the architecture (RoPE tables, in complex numbers) or from a fixed seed."""
    return name.endswith("freqs_cis") or name == _EMBEDDING


def _attention(dropout: float, batch_first: bool = False) -> MultiheadAttentionWrapper:
    return MultiheadAttentionWrapper(
        num_heads=_HEADS, dropout=dropout, embed_dim=_WIDTH, batch_first=batch_first
    )


def _sine_positions(width: int = _WIDTH) -> PositionEmbeddingSine:
    # precompute_resolution would create its tables on CUDA; without it they are made when first used.
    return PositionEmbeddingSine(
        num_pos_feats=width, normalize=True, scale=None, temperature=10000, precompute_resolution=None
    )


def _vision_encoder(dropout: float) -> Sam3DualViTDetNeck:
    trunk = ViT(
        img_size=TINY.resolution,
        pretrain_img_size=TINY.resolution,  # a smaller table is tiled, is periodic, and the model cannot localise
        patch_size=_PATCH,
        embed_dim=_VIT_WIDTH,
        depth=4,
        num_heads=4,
        mlp_ratio=4.0,
        norm_layer="LayerNorm",
        drop_path_rate=dropout,
        qkv_bias=True,
        use_abs_pos=True,
        tile_abs_pos=True,
        global_att_blocks=(1, 3),  # the last block must be global: only such blocks give features
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=4,
        pretrain_use_cls_token=True,
        retain_cls_token=False,
        ln_pre=True,
        ln_post=False,
        return_interm_layers=False,
        bias_patch_embed=False,
        compile_mode=None,
    )
    side = TINY.resolution // _PATCH
    table = _sine_positions(_VIT_WIDTH)(torch.zeros(1, 1, side, side))[0].flatten(1).t()
    with torch.no_grad():
        # RoPE is relative and attention values carry no position: start from an absolute one (AP50 0.12 -> 0.54
        # after 600 steps) instead of noise.
        trunk.pos_embed[0, 1:] = 0.3 * table
    return Sam3DualViTDetNeck(
        position_encoding=_sine_positions(),
        d_model=_WIDTH,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        trunk=trunk,
        add_sam2_neck=False,
    )


def _text_encoder() -> VETextEncoder:
    encoder = VETextEncoder(
        tokenizer=SimpleTokenizer(bpe_path=str(bpe_path())),
        d_model=_WIDTH,
        width=_TEXT_WIDTH,
        heads=_HEADS,
        layers=2,
    )
    text = encoder.encoder
    fill_uninitialised(text)
    text.token_embedding.weight = nn.Parameter(seeded_token_embedding(), requires_grad=False)
    return encoder


def _transformer(dropout: float) -> TransformerWrapper:
    transformer = TransformerWrapper(
        encoder=_detr_encoder(dropout), decoder=_detr_decoder(dropout), d_model=_WIDTH
    )
    decoder = transformer.decoder
    for position_bias in (decoder.boxRPB_embed_x, decoder.boxRPB_embed_y):
        _look_inside_the_box(position_bias)  # only now: the wrapper draws all matrices of both anew
    return transformer


def _detr_encoder(dropout: float) -> TransformerEncoderFusion:
    return TransformerEncoderFusion(
        layer=TransformerEncoderLayer(
            activation="relu",
            d_model=_WIDTH,
            dim_feedforward=_FFN_WIDTH,
            dropout=dropout,
            pos_enc_at_attn=True,
            pos_enc_at_cross_attn_keys=False,
            pos_enc_at_cross_attn_queries=False,
            pre_norm=True,
            self_attention=_attention(dropout, batch_first=True),
            cross_attention=_attention(dropout, batch_first=True),
        ),
        num_layers=2,
        d_model=_WIDTH,
        num_feature_levels=1,
        frozen=False,
        use_act_checkpoint=True,
        add_pooled_text_to_img_feat=False,
        pool_text_with_mask=True,
    )


def _detr_decoder(dropout: float) -> TransformerDecoder:
    decoder = TransformerDecoder(
        layer=TransformerDecoderLayer(
            activation="relu",
            d_model=_WIDTH,
            dim_feedforward=_FFN_WIDTH,
            dropout=dropout,
            cross_attention=_attention(dropout),
            n_heads=_HEADS,
            use_text_cross_attention=True,
        ),
        num_layers=3,
        num_queries=TINY.num_queries,
        return_intermediate=True,
        box_refine=True,
        num_o2m_queries=0,
        dac=True,
        boxRPB="log",
        d_model=_WIDTH,
        frozen=False,
        interaction_layer=None,
        dac_use_selfatt_ln=True,
        resolution=None,  # as with precompute_resolution: a coordinate cache on CUDA
        stride=None,
        use_act_checkpoint=True,
        presence_token=True,
    )
    side = round(TINY.num_queries**0.5)
    centers = [(step + 0.5) / side for step in range(side)]
    boxes = torch.tensor([[x, y, 0.35, 0.35] for y in centers for x in centers])
    with torch.no_grad():
        decoder.reference_points.weight.copy_(torch.logit(boxes))  # a grid instead of noise
    return decoder


@torch.no_grad()
def _look_inside_the_box(position_bias: MLP) -> None:
    """Let the attention of each query start near its reference box, each head more strictly than the one before.

    The MLP takes the distances of a token to the two edges of the box, one negative inside, and gives a bias for
    each head. From random values, boxes do not settle within 1000 steps; from these they do within 400.
    """
    hidden, heads = position_bias.layers
    hidden.weight[:2] = torch.tensor(
        [[-1.0, 0.0], [0.0, 1.0]]
    )  # how far before the first, behind the second edge
    hidden.bias[:2] = 0
    heads.weight.mul_(0.1)
    heads.weight[:, :2] = -torch.tensor([1.0, 3.0, 6.0, 12.0])[:, None]


def _geometry_encoder(dropout: float) -> SequenceGeometryEncoder:
    return SequenceGeometryEncoder(
        pos_enc=_sine_positions(),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=_WIDTH,
        num_layers=1,
        layer=TransformerEncoderLayer(
            activation="relu",
            d_model=_WIDTH,
            dim_feedforward=_FFN_WIDTH,
            dropout=dropout,
            pos_enc_at_attn=False,
            pre_norm=True,
            self_attention=_attention(dropout),
            pos_enc_at_cross_attn_queries=False,
            pos_enc_at_cross_attn_keys=True,
            cross_attention=_attention(dropout),
        ),
        use_act_ckpt=True,
        add_cls=True,
        add_post_encode_proj=True,
    )


def _segmentation_head() -> UniversalSegmentationHead:
    return UniversalSegmentationHead(
        hidden_dim=_WIDTH,
        upsampling_stages=3,
        aux_masks=False,
        presence_head=False,
        dot_product_scorer=None,
        act_ckpt=True,
        cross_attend_prompt=_attention(dropout=0.0),
        pixel_decoder=PixelDecoder(num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=_WIDTH),
    )


def _scoring(dropout: float) -> DotProductScoring:
    return DotProductScoring(
        d_model=_WIDTH,
        d_proj=_WIDTH,
        prompt_mlp=MLP(
            _WIDTH, _FFN_WIDTH, _WIDTH, 2, dropout=dropout, residual=True, out_norm=nn.LayerNorm(_WIDTH)
        ),
    )
