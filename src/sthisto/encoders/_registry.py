"""The registry of encoders: one record each, known before anything is imported or downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from sthisto.encoders._protocols import Encoder

Color = tuple[float, float, float]
Pooling = Literal["class", "mean", "both", "native"]

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
    parameters
        Number of weights, millions.
    hest
        Score on HEST-Bench (mean Pearson r over nine tasks, as published by April 2026); ``None`` where unknown.
    gated
        Whether access to the weights has to be requested.
    license, commercial
        License of the weights, and whether it allows commercial use; ``None`` where its text has to be read.
    reference
        The publication.
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
    parameters: float | None = None
    hest: float | None = None
    gated: bool = False
    license: str
    commercial: bool | None = None
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


_NC_ND: dict[str, Any] = {"gated": True, "license": "CC-BY-NC-ND-4.0", "commercial": False}
_APACHE: dict[str, Any] = {"license": "Apache-2.0", "commercial": True}
_BSD: dict[str, Any] = {"license": "BSD-3-Clause", "commercial": True}
_BIOPTIMUS: dict[str, Any] = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_KAIKO: dict[str, Any] = {
    "params": {"dynamic_img_size": True},
    "license": "kaiko.ai terms (see the model card)",
    "reference": "kaiko.ai et al. 2024, arXiv 2404.15217",
    **_HALF,
}
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}  # classes of timm and torch, by name
_DYNAMIC = {"init_values": 1e-5, "dynamic_img_size": True}
_GIANT: dict[str, Any] = {
    "architecture": "vit_giant_patch14_reg4_dinov2",
    "params": {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
    "dim": 1536,
    "parameters": 1135,
}
_HUGE = {"img_size": 224, "mlp_ratio": 5.3375, **_DYNAMIC, **_SWIGLU}

ENCODERS: dict[str, EncoderSpec] = {
    "handcrafted": EncoderSpec(
        source="sthisto.encoders.handcrafted:build",
        dim=102,
        input_size=256,
        patch_um=512.0,
        **_BSD,
        reference="Ruifrok & Johnston 2001; Haralick et al. 1973; Ojala et al. 2002",
    ),
    "uni": EncoderSpec(
        weights="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        params=_DYNAMIC,
        dim=1024,
        parameters=303,
        hest=0.3873,
        **_NC_ND,
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
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_DYNAMIC,
            **_SWIGLU,
        },
        dim=1536,
        parameters=681,
        hest=0.4141,
        **_NC_ND,
        reference="Chen et al. 2024, Nat. Med. 30, 850",
    ),
    "h-optimus-0": EncoderSpec(
        weights="bioptimus/H-optimus-0",
        hest=0.4150,
        **_GIANT,
        **_BIOPTIMUS,
        **_APACHE,
        reference="Saillard et al. 2024, H-optimus-0 (Bioptimus)",
    ),
    "h-optimus-1": EncoderSpec(
        weights="bioptimus/H-optimus-1",
        hest=0.4229,
        **_GIANT,
        **_BIOPTIMUS,
        **_NC_ND,
        reference="Bioptimus 2025, H-optimus-1",
    ),
    "h0-mini": EncoderSpec(
        weights="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        params={"img_size": 224, "mlp_ratio": 5.33334, **_DYNAMIC, **_SWIGLU},
        dim=768,
        parameters=86,
        hest=0.3958,
        **_BIOPTIMUS,
        **_NC_ND,
        reference="Filiot et al. 2025, arXiv 2501.16239",
    ),
    "virchow": EncoderSpec(
        weights="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        params=_HUGE,
        pooling="both",
        dim=2560,
        parameters=631,
        hest=0.4061,
        gated=True,
        **_APACHE,
        reference="Vorontsov et al. 2024, Nat. Med. 30, 2924",
    ),
    "virchow2": EncoderSpec(
        weights="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        params={**_HUGE, "reg_tokens": 4},
        pooling="both",
        dim=2560,
        parameters=631,
        hest=0.4034,
        **_NC_ND,
        reference="Zimmermann et al. 2024, arXiv 2408.00738",
    ),
    "midnight": EncoderSpec(
        builder="transformers",
        weights="kaiko-ai/midnight",
        architecture="dinov2",
        params={
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            "image_size": 518,
            "patch_size": 14,  # the position embedding is interpolated to 224 pixels
        },
        pooling="both",
        dim=3072,
        parameters=1137,
        hest=0.3952,
        **_HALF,
        license="MIT",
        commercial=True,
        reference="Karasikov et al. 2025, arXiv 2504.05186",
    ),
    "openmidnight": EncoderSpec(
        weights="SophontAI/OpenMidnight",
        unused=("mask_token",),
        hest=0.3912,
        gated=True,
        **_GIANT,
        **_APACHE,
        reference="Kaplan et al. 2025, OpenMidnight (Sophont)",
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
        parameters=1135,
        hest=0.3875,
        gated=True,
        license="Prov-GigaPath terms (research use, see the model card)",
        commercial=False,
        reference="Xu et al. 2024, Nature 630, 181",
    ),
    "kaiko-b8": EncoderSpec(
        weights="1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms",
        architecture="vit_base_patch8_224",
        dim=768,
        parameters=86,
        hest=0.3735,
        **_KAIKO,
    ),
    "kaiko-s16": EncoderSpec(
        weights="1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
        architecture="vit_small_patch16_224",
        dim=384,
        parameters=22,
        hest=0.3493,
        **_KAIKO,
    ),
    "lunit-s8": EncoderSpec(
        weights="1aurent/vit_small_patch8_224.lunit_dino",
        architecture="vit_small_patch8_224",
        params={"dynamic_img_size": True},
        dim=384,
        parameters=22,
        hest=0.3678,
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
        license="Lunit non-commercial license",
        commercial=False,
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
        parameters=303,
        hest=0.3747,
        license="Owkin non-commercial license",
        commercial=False,
        reference="Filiot et al. 2024, arXiv 2409.09173",
    ),
    "resnet50": EncoderSpec(
        weights="timm/resnet50.tv_in1k",
        architecture="resnet50",
        params={"features_only": True, "out_indices": (3,)},  # the third of four stages, as in HEST-Bench
        unused=("layer4.", "fc."),
        pooling="mean",
        dim=1024,
        parameters=9,
        hest=0.3253,
        **_BSD,
        reference="He et al. 2016, CVPR, 770",
    ),
}
