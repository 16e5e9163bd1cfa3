"""X-CLIP for users of transformers: ``register()`` once, then its Auto classes, its pipeline and its Trainer."""

from __future__ import annotations

from .training import loss

__all__ = ["TASK", "loss", "register"]

TASK = "zero-shot-video-classification"


def register() -> None:
    """Registers this package with transformers. A second call in a process changes nothing.

    Then ``AutoConfig``, ``AutoModel`` and ``AutoProcessor`` read folders that ``XCLIP.save_pretrained`` wrote, and
    ``pipeline("zero-shot-video-classification", model=...)`` classifies video files with such a folder, with one of
    Hugging Face's X-CLIPs (whose blocks it accelerates), or with the name of either on the Hub.

    Raises:
        ImportError: if transformers is not installed, or is older than version 5.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig  # noqa: F401  # since 5
        from transformers.pipelines import PIPELINE_REGISTRY
    except ImportError as error:
        raise ImportError("xclip_fast.huggingface needs transformers 5: pip install 'transformers>=5'") from error
    from .models import XCLIPFastConfig, XCLIPFastModel, XCLIPFastProcessor
    from .pipeline import ZeroShotVideoClassificationPipeline

    AutoConfig.register(XCLIPFastConfig.model_type, XCLIPFastConfig, exist_ok=True)
    AutoModel.register(XCLIPFastConfig, XCLIPFastModel, exist_ok=True)
    AutoProcessor.register(XCLIPFastConfig, XCLIPFastProcessor, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, ZeroShotVideoClassificationPipeline, pt_model=AutoModel, type="multimodal"
        )
