"""A pytest plugin: every X-CLIP of transformers that a test makes or loads is accelerated."""

import functools

import transformers
from transformers.models.x_clip import modeling_x_clip

import xclip_fast

accelerated = 0


def _accelerate(model):
    global accelerated
    if not any(parameter.is_meta for parameter in model.parameters()):  # from_pretrained fills those later
        xclip_fast.accelerate(model)
        accelerated += 1


def _accelerate_when_made(kind):
    original = kind.__init__

    @functools.wraps(original)
    def init(self, *args, **options):
        original(self, *args, **options)
        if type(self) is kind:  # not a part of a larger model
            _accelerate(self)

    kind.__init__ = init


for name in ("XCLIPModel", "XCLIPVisionModel", "XCLIPTextModel"):
    _accelerate_when_made(getattr(modeling_x_clip, name))

_load = transformers.PreTrainedModel.from_pretrained.__func__


@functools.wraps(_load)
def _accelerate_when_loaded(kind, *args, **options):
    result = _load(kind, *args, **options)
    model = result[0] if isinstance(result, tuple) else result
    if model.__module__ == modeling_x_clip.__name__:
        _accelerate(model)
    return result


transformers.PreTrainedModel.from_pretrained = classmethod(_accelerate_when_loaded)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"accelerated models: {accelerated}")
