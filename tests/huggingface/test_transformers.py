"""transformers' Auto classes, its pipeline and its Trainer with our folders and Hugging Face's."""

import ast
import dataclasses
import textwrap
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from xclip_fast import XCLIP, decode, huggingface, tokenize  # noqa: E402
from xclip_fast.data.motion import write_clip  # noqa: E402
from xclip_fast.weights import checkpoint  # noqa: E402
from xclip_fast.weights.recipe import FILE, Trained  # noqa: E402

CONFIG = dataclasses.replace(small.CONFIG, num_frames=4)
LABELS = ["riding a bike", "swimming", "juggling"]


@pytest.fixture(autouse=True)
def _registered():
    huggingface.register()
    huggingface.register()  # which changes nothing


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = XCLIP(CONFIG).eval()
    found.logit_scale.data.fill_(3.0)
    return found


@pytest.fixture
def folder(model, tmp_path):
    trained = Trained(frames=6, sampling="dense")
    checkpoint.write(model.state_dict(), CONFIG, tmp_path / "ours", beside={FILE: trained.to_json()})
    return tmp_path / "ours"


@pytest.fixture
def clip(tmp_path):
    frames = torch.arange(20)[:, None, None, None] * 10 + torch.randint(0, 50, (20, 48, 64, 3))
    write_clip(tmp_path / "clip.mp4", frames.to(torch.uint8).numpy())
    return tmp_path / "clip.mp4"


def probabilities(model, frames, labels):
    with torch.no_grad():
        return model(frames[None], labels)[0].softmax(-1)


def check(answer, wanted, labels=LABELS):
    assert [row["score"] for row in answer] == sorted((row["score"] for row in answer), reverse=True)
    found = {row["label"]: row["score"] for row in answer}
    assert list(found) == [labels[i] for i in wanted.argsort(descending=True)]
    assert torch.tensor([found[label] for label in labels]) == pytest.approx(wanted, abs=2e-5)


def test_auto_classes_read_our_folder(model, folder, clip):
    found = transformers.AutoModel.from_pretrained(folder)
    assert type(found).__name__ == "XCLIPFastModel"
    assert found.xclip.config == CONFIG
    assert not found.training
    assert all(torch.equal(a, b) for a, b in zip(found.xclip.parameters(), model.parameters(), strict=True))
    assert transformers.AutoConfig.from_pretrained(folder).to_xclip() == CONFIG
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(text=LABELS, videos=[str(clip)])
    assert torch.equal(inputs["pixel_values"][0], decode(clip, 6, "dense", size=32))  # as trained
    with torch.no_grad():
        outputs = found(**inputs)
        torch.testing.assert_close(outputs.logits_per_video, model(inputs["pixel_values"], LABELS))
        assert torch.equal(outputs.logits_per_text, outputs.logits_per_video.T)
        features = found.get_video_features(inputs["pixel_values"])
        torch.testing.assert_close(outputs.video_embeds, features.video)
        torch.testing.assert_close(outputs.text_embeds, found.get_text_features(inputs["input_ids"]))
    half = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_processor_takes_arrays(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    frames = torch.randint(0, 256, (9, 48, 64, 3), dtype=torch.uint8).numpy()
    found = processor(videos=frames, num_frames=3)
    assert found["pixel_values"].shape == (1, 3, 32, 32, 3)
    assert "input_ids" not in found
    assert torch.equal(processor(videos=[frames, frames], num_frames=3)["pixel_values"][1], found["pixel_values"][0])
    with pytest.raises(ValueError, match=r"uint8 \(T, H, W, 3\) wanted"):
        processor(videos=[frames[..., 0]])


def test_saved_again_it_is_a_folder_of_ours(model, folder, tmp_path):
    found = transformers.AutoModel.from_pretrained(folder)
    found.save_pretrained(tmp_path / "again")
    found.save_pretrained(tmp_path / "again", state_dict=found.state_dict())
    again = XCLIP.from_pretrained(tmp_path / "again")
    assert again.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_pipeline_on_our_folder(model, folder, clip):
    classify = transformers.pipeline("zero-shot-video-classification", model=str(folder))
    check(classify(str(clip), candidate_labels=LABELS), probabilities(model, decode(clip, 6, "dense", size=32), LABELS))
    first, second = classify([str(clip), str(clip)], candidate_labels=LABELS, num_frames=2, top_k=1)
    assert first[0]["label"] == second[0]["label"]
    assert first[0]["score"] == pytest.approx(second[0]["score"], abs=1e-5)
    assert len(first) == 1
    sentences = [f"a video of {label}" for label in LABELS]
    with pytest.raises(ValueError, match="needs exactly one"):
        classify(clip, candidate_labels=LABELS, hypothesis_template="a video")
    answer = classify(clip, candidate_labels=LABELS, hypothesis_template="a video of {}", num_frames=4)
    check(answer, probabilities(model, decode(clip, 4, "dense", size=32), sentences))
    with pytest.raises(ValueError, match="a list of strings wanted"):
        classify(str(clip), candidate_labels="riding a bike")
    with pytest.raises(TypeError, match="unknown arguments: labels"):
        classify(str(clip), candidate_labels=LABELS, labels=LABELS)


def test_pipeline_on_a_folder_of_hugging_face(model, clip, tmp_path):
    model.save_pretrained(tmp_path / "theirs", layout="huggingface")
    classify = transformers.pipeline("zero-shot-video-classification", model=str(tmp_path / "theirs"))
    assert isinstance(classify.model, transformers.XCLIPModel)
    assert hasattr(type(classify.model.vision_model.encoder.layers[0]), "_accelerated_from")
    check(classify(str(clip), candidate_labels=LABELS), probabilities(model, decode(clip, 4, size=32), LABELS))


def test_pipeline_refuses_other_models():
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 16})
    with pytest.raises(ValueError, match="CLIPModel is not an X-CLIP"):
        transformers.pipeline("zero-shot-video-classification", model=transformers.CLIPModel(config))


def test_loss():
    outputs = {"logits_per_video": torch.randn(4, 3, requires_grad=True)}
    labels = torch.tensor([0, 2, -100, 1])
    wanted = F.cross_entropy(outputs["logits_per_video"][[0, 1, 3]], labels[[0, 1, 3]])
    assert torch.allclose(huggingface.loss(outputs, labels), wanted)
    assert torch.allclose(huggingface.loss(outputs, labels, 6), wanted / 2)
    with_attributes = type("Output", (), outputs)
    assert torch.allclose(huggingface.loss(with_attributes, labels), wanted)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "Hugging Face's"])
def test_trainer(model, folder, tmp_path, theirs):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "theirs", layout="huggingface")
    trained = transformers.AutoModel.from_pretrained(tmp_path / "theirs" if theirs else folder)
    ids, generator = tokenize(LABELS), torch.Generator().manual_seed(0)
    rows = [{"video": torch.randn(4, 3, 32, 32, generator=generator), "label": number % 3} for number in range(6)]

    def collate(batch):
        videos, labels = (torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in ("video", "label"))
        return {"pixel_values": videos, "input_ids": ids, "labels": labels}

    options = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 3, "max_steps": 8, "use_cpu": True}
    options |= {"learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "remove_unused_columns": False}
    options |= {"disable_tqdm": True, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = transformers.Trainer(
        trained,
        transformers.TrainingArguments(**options),
        data_collator=collate,
        train_dataset=rows,
        compute_loss_func=huggingface.loss,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(tmp_path / "kept")
    kept = XCLIP.from_pretrained(tmp_path / "kept")
    assert not torch.equal(kept.visual.proj, model.visual.proj)


def test_the_page_as_a_new_user_would_type_it(model, clip, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    code = page.partition("    import xclip_fast.huggingface\n")[2].partition("\n\nThe model is")[0]
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("xclip-base-patch16")
    exec(compile("import xclip_fast.huggingface\n" + textwrap.dedent(code), "docs/models.md", "exec"), {})
    wanted = probabilities(model, decode("clip.mp4", 4, size=32), ["riding a bike", "swimming"])
    check(ast.literal_eval(capsys.readouterr().out), wanted, ["riding a bike", "swimming"])
