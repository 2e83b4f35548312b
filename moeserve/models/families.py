"""All families by their `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moeserve.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moeserve.models.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        module.FAMILY.model_type: module.FAMILY
        for module in (
            deepseek_v2,
            deepseek_v3,
            glm4_moe,
            gpt_oss,
            llama,
            mistral,
            mixtral,
            olmoe,
            qwen2,
            qwen2_moe,
            qwen3,
            qwen3_moe,
        )
    }
)
