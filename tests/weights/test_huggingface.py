"""The whole model against ``transformers.XCLIPModel``: same weights, in the shape of every published checkpoint.

By default both towers have two layers, one for many frames, and a short vocabulary, and L/14 gets 4 frames.
XCLIP_FAST_FULL_TESTS=1 takes every shape whole: minutes each on two cores, and for L/14@336 some 30 GB of memory.
"""

import dataclasses
import os

import pytest
import torch

from xclip_fast import VARIANTS, XCLIP, VisionConfig
from xclip_fast.weights import checkpoint
from xclip_fast.weights.layouts import from_huggingface

transformers = pytest.importorskip("transformers")

FULL = os.environ.get("XCLIP_FAST_FULL_TESTS") == "1"
ONE_LAYER = {"B/16-16f", "B/16-32f", "L/14@336-16f"}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def published(name):
    """The configuration as published: 8 heads in MIT and prompts whatever their width."""
    ours = VARIANTS[name]
    layers = 1 if name in ONE_LAYER else 2
    vision = {
        "hidden_size": ours.vision.width,
        "intermediate_size": 4 * ours.vision.width,
        "num_hidden_layers": ours.vision.layers if FULL else layers,
        "num_attention_heads": ours.vision.heads,
        "image_size": ours.vision.image_size,
        "patch_size": ours.vision.patch_size,
        "num_frames": 4 if name.startswith("L/14") and not FULL else ours.num_frames,
        "mit_hidden_size": ours.embed_dim,
        "mit_intermediate_size": 4 * ours.embed_dim,
        "mit_num_attention_heads": 8,
    }
    text = {
        "hidden_size": ours.text.width,
        "intermediate_size": 4 * ours.text.width,
        "num_hidden_layers": ours.text.layers if FULL else layers,
        "num_attention_heads": ours.text.heads,
        "vocab_size": ours.text.vocab_size if FULL else 1000,
    }
    return transformers.XCLIPConfig(text_config=text, vision_config=vision, projection_dim=ours.embed_dim)


@torch.no_grad()
def randomise(model, seed):
    """Weights under which outputs differ between videos and between labels, and no gradient is tiny by chance."""
    generator = torch.Generator().manual_seed(seed)
    depth = max(model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            parameter.fill_(1.5)
        elif name == "prompts_generator.alpha":
            parameter.copy_(0.3 + 0.1 * noise)
        elif parameter.ndim == 1:
            norm = "norm" in name or "_ln" in name
            parameter.copy_(1 + 0.2 * noise if norm and name.endswith("weight") else 0.2 * noise)
        elif "embedding" in name and "patch" not in name:
            parameter.copy_(0.7 * noise)
        else:
            fan_in = parameter[0].numel() if name != "prompts_visual_projection" else parameter.shape[0]
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            parameter.copy_(noise * (fan_in * (2 * depth if residual else 1)) ** -0.5)


def labels(vocabulary):
    """Tokens (4, 77) of labels of 1 to 75 words, padded with zeros; the largest number ends a label."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(4, 77, dtype=torch.int64)
    for row, words in zip(tokens, (1, 3, 8, 75), strict=True):
        row[0] = vocabulary - 2
        row[1 : 1 + words] = torch.randint(1, vocabulary - 2, (words,), generator=generator)
        row[1 + words] = vocabulary - 1
    return tokens


def assert_close(name, got, wanted, relative):
    error = (got - wanted).abs().max().item() / wanted.abs().max().item()
    assert error <= relative, f"{name}: off by {error:.2e} of the largest value, {relative:.0e} allowed"


def theirs(model, video, tokens):
    """Logits, video, text and patch features from one forward of Hugging Face's model."""
    out = model(pixel_values=video, input_ids=tokens)
    hidden_FLD = out.vision_model_output.last_hidden_state
    patches = model.prompts_visual_layernorm(hidden_FLD[:, 1:]) @ model.prompts_visual_projection
    patches = patches.unflatten(0, video.shape[:2]).mean(1)
    text = model.text_projection(out.text_model_output.pooler_output)
    return {"logits": out.logits_per_video, "video": out.mit_output.pooler_output, "text": text, "patches": patches}


@pytest.mark.parametrize("name", [name for name, row in VARIANTS.items() if isinstance(row.vision, VisionConfig)])
def test_same_outputs_and_gradients(name, tmp_path):
    config = published(name)
    peer = transformers.XCLIPModel(config).eval()
    randomise(peer, seed=0)
    peer.save_pretrained(tmp_path)
    model = XCLIP.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # hundreds of megabytes
    assert model.config.mit_heads == model.config.prompt_heads == 8
    if FULL:
        heads = {"mit_heads": 8, "prompt_heads": 8, "logit_scale": config.logit_scale_init_value}
        assert model.config == dataclasses.replace(VARIANTS[name], **heads)

    vision = config.vision_config
    generator = torch.Generator().manual_seed(2)
    videos = 2 if name.startswith("B/32") else 1
    shape = (videos, vision.num_frames, 3, vision.image_size, vision.image_size)
    video = torch.randn(shape, generator=generator)
    tokens = labels(config.text_config.vocab_size)
    weigh = torch.randn(videos, len(tokens), generator=generator)

    wanted = theirs(peer, video, tokens)
    (wanted["logits"] * weigh).sum().backward()
    wanted = {key: value.detach() for key, value in wanted.items()}
    gradients = from_huggingface({key: value.grad for key, value in peer.named_parameters()})
    del peer

    found = model.encode_video(video)
    text = model.encode_text(tokens)
    logits = model.similarity(found, text)
    (logits * weigh).sum().backward()

    assert wanted["logits"].std() > 0.02 * wanted["logits"].abs().max()  # or else the comparison says little
    for key, value in {"logits": logits, "video": found.video, "text": text, "patches": found.patches}.items():
        assert_close(key, value.detach(), wanted[key], 1e-4)
    for key, parameter in model.named_parameters():
        assert gradients[key].abs().max() > 0, key
        assert_close(key, parameter.grad, gradients[key], 1e-3)


def test_written_in_their_layout_they_read_it_back(tmp_path):
    torch.manual_seed(0)
    config = VARIANTS["B/32-8f"]
    vision, text = (dataclasses.replace(part, layers=1) for part in (config.vision, config.text))
    model = XCLIP(dataclasses.replace(config, vision=vision, text=text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf", layout="huggingface")

    peer, info = transformers.XCLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    video, tokens = torch.randn(1, 8, 3, 224, 224), labels(49408)
    with torch.no_grad():
        wanted = theirs(peer.eval(), video, tokens)
        assert_close("logits", model(video, tokens), wanted["logits"], 1e-4)

    again = checkpoint.read(tmp_path / "hf")
    assert again.kind == "huggingface"
    assert again.config == model.config
    assert all(torch.equal(value, again.state[key]) for key, value in model.state_dict().items())


def test_our_export_works_in_the_documented_call(tmp_path):
    """transformers' own usage of X-CLIP, on frames of a video: pictures and logits as ``decode`` and ours give them."""
    import av

    from xclip_fast.data.decode.decoder import decode, decode_frames

    torch.manual_seed(0)
    config = VARIANTS["B/32-8f"]
    small = dataclasses.replace(config.vision, width=64, layers=1, heads=1)
    text = dataclasses.replace(config.text, width=64, layers=1, heads=1)
    config = dataclasses.replace(config, vision=small, text=text, embed_dim=64, mit_heads=1, prompt_heads=1)
    model = XCLIP(config).eval()
    model.save_pretrained(tmp_path / "x", layout="huggingface")
    y, x = torch.meshgrid(torch.arange(240), torch.arange(320), indexing="ij")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 320, 240
        for number in range(8):
            picture = torch.stack([(x + 8 * number) % 256, y, (x + y) // 3], -1).to(torch.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), "rgb24")))
        file.mux(stream.encode())
    ours = decode(tmp_path / "clip.mp4", 8)[None]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "x")
    texts, frames = ["riding a bike", "jumping"], list(decode_frames(tmp_path / "clip.mp4", range(8)))
    inputs = processor(text=texts, videos=frames, return_tensors="pt", padding=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    theirs = 255 * (inputs["pixel_values"] * std + mean).permute(0, 1, 3, 4, 2)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 1.0  # of 256 levels; with the short side at 224 it is above 10
    with torch.no_grad():
        wanted = transformers.XCLIPModel.from_pretrained(tmp_path / "x").eval()(**inputs).logits_per_video
        assert_close("logits", model(inputs["pixel_values"], texts), wanted, 1e-4)
        assert (model(ours, texts) - wanted).abs().max() < 0.05 * wanted.abs().max()
