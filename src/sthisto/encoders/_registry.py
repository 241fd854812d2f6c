"""The registry of encoders: one record each, known before anything is imported or downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from sthisto.encoders._protocols import Encoder

Color = tuple[float, float, float]
Pooling = Literal["class", "mean", "both", "native"]

NC_ND = "CC-BY-NC-ND-4.0"
OPEN_LICENSES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Record of an encoder in the registry: architecture, input, weights and license.

    Attributes
    ----------
    source
        ``"module:function"`` that builds the encoder, called as ``function(name, spec, **options)``.
    dim
        Number of features per patch.
    input_size, patch_um
        Side of the input patch in pixels, and of the tissue that it shows in um.
    weights
        Repository ``"owner/name"`` on the Hub; ``None`` for an encoder without weights.
    builder, architecture, params
        Library that builds the network, its name there and its arguments.
    unused
        Prefixes of weights that the features do not need.
    pooling
        Default pooling, as in :func:`load`.
    mean, std
        Color normalization, of colors from 0 to 1.
    gated
        Whether access to the weights has to be requested.
    license, reference
        License of the weights, and the publication.
    """

    source: str = "sthisto.encoders._sources:from_registry"
    dim: int
    input_size: int = 224
    patch_um: float = 112.0  # 224 pixels at the 0.5 um/px of most pathology models
    weights: str | None = None
    builder: Literal["timm", "transformers"] = "timm"
    architecture: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    pooling: Pooling = "class"
    mean: Color = (0.485, 0.456, 0.406)  # of ImageNet
    std: Color = (0.229, 0.224, 0.225)
    gated: bool = False
    license: str
    reference: str

    @property
    def mpp(self) -> float:
        """Scale of the input, um per pixel."""
        return self.patch_um / self.input_size

    def load(self, name: str, **options: Any) -> Encoder:
        """Import the source and build the encoder."""
        module, function = self.source.split(":")
        encoder: Encoder = getattr(import_module(module), function)(name, self, **options)
        return encoder


def is_redistributable(license: str, *, gated: bool) -> bool:
    """Whether a license lets anyone pass the weights on; an unknown one does not."""
    return license.lower() in OPEN_LICENSES and not gated


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}  # classes of timm and torch, by name
_GIANT_REG4 = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False}
_BIOPTIMUS: tuple[Color, Color] = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)  # mean, std
_HALF: Color = (0.5, 0.5, 0.5)
_KAIKO = "1aurent/vit_{}_224.kaiko_ai_towards_large_pathology_fms"

ENCODERS: dict[str, EncoderSpec] = {
    "handcrafted": EncoderSpec(
        source="sthisto.encoders.handcrafted:build",
        dim=102,
        input_size=256,
        patch_um=512.0,
        license="BSD-3-Clause",
        reference="Ruifrok & Johnston 2001; Haralick et al. 1973; Ojala et al. 2002",
    ),
    "uni": EncoderSpec(
        weights="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        params={"init_values": 1e-5, "dynamic_img_size": True},
        dim=1024,
        gated=True,
        license=NC_ND,
        reference="Chen et al. 2024, Nat. Med. 30, 850",
    ),
    "uni2-h": EncoderSpec(
        weights="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        params={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        dim=1536,
        gated=True,
        license=NC_ND,
        reference="Chen et al. 2024, Nat. Med. 30, 850",
    ),
    "h-optimus-0": EncoderSpec(
        weights="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        params=_GIANT_REG4,
        dim=1536,
        mean=_BIOPTIMUS[0],
        std=_BIOPTIMUS[1],
        license="Apache-2.0",
        reference="Saillard et al. 2024, H-optimus-0 (Bioptimus)",
    ),
    "h-optimus-1": EncoderSpec(
        weights="bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        params=_GIANT_REG4,
        dim=1536,
        mean=_BIOPTIMUS[0],
        std=_BIOPTIMUS[1],
        gated=True,
        license=NC_ND,
        reference="Bioptimus 2025, H-optimus-1",
    ),
    "h0-mini": EncoderSpec(
        weights="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        params={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, "dynamic_img_size": True, **_SWIGLU},
        dim=768,
        mean=_BIOPTIMUS[0],
        std=_BIOPTIMUS[1],
        gated=True,
        license=NC_ND,
        reference="Filiot et al. 2025, arXiv 2501.16239",
    ),
    "virchow2": EncoderSpec(
        weights="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        params={
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        pooling="both",
        dim=2560,
        gated=True,
        license=NC_ND,
        reference="Zimmermann et al. 2024, arXiv 2408.00738",
    ),
    "gigapath": EncoderSpec(
        weights="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        params={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
        },
        dim=1536,  # its authors cut 256 px at 0.5 um/px and keep the middle 224
        gated=True,
        license="Prov-GigaPath terms (research use, see the model card)",
        reference="Xu et al. 2024, Nature 630, 181",
    ),
    "kaiko-b8": EncoderSpec(
        weights=_KAIKO.format("base_patch8"),
        architecture="vit_base_patch8_224",
        params={"dynamic_img_size": True},
        dim=768,
        mean=_HALF,
        std=_HALF,
        license="kaiko.ai terms (see the model card)",
        reference="kaiko.ai et al. 2024, arXiv 2404.15217",
    ),
    "kaiko-s16": EncoderSpec(
        weights=_KAIKO.format("small_patch16"),
        architecture="vit_small_patch16_224",
        params={"dynamic_img_size": True},
        dim=384,
        mean=_HALF,
        std=_HALF,
        license="kaiko.ai terms (see the model card)",
        reference="kaiko.ai et al. 2024, arXiv 2404.15217",
    ),
    "lunit-s8": EncoderSpec(
        weights="1aurent/vit_small_patch8_224.lunit_dino",
        architecture="vit_small_patch8_224",
        params={"dynamic_img_size": True},
        dim=384,
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
        license="Lunit non-commercial license",
        reference="Kang et al. 2023, CVPR, 3344",
    ),
    "phikon-v2": EncoderSpec(
        builder="transformers",
        weights="owkin/phikon-v2",
        architecture="dinov2",
        params={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
        },
        dim=1024,
        license="Owkin non-commercial license",
        reference="Filiot et al. 2024, arXiv 2409.09173",
    ),
    "resnet50": EncoderSpec(
        weights="timm/resnet50.tv_in1k",
        architecture="resnet50",
        params={"features_only": True, "out_indices": (3,)},  # the third of four stages, as HEST-Bench takes it
        unused=("layer4.", "fc."),
        pooling="mean",
        dim=1024,
        license="BSD-3-Clause",
        reference="He et al. 2016, CVPR, 770",
    ),
}
