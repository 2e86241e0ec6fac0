"""ONNX and TorchScript compute what the model computes, for other sizes than the exporter saw, or are not written."""

import json

import pytest
import torch

from recipes import export
from recipes.export import ExportError, example, export_model
from tests.recipes import tiny


def recurrent():
    """A small model of ours: masks padding also when exported."""
    from recipes.ctc_model import CTCModel

    cfg = tiny.config()
    cfg.encoder = {"_target_": "recipes.deepspeech2.encoder.DeepSpeech2Encoder", "feat_in": 16, "conv_channels": [4, 4],
                   "rnn_layers": 1, "rnn_hidden": 16}
    cfg.decoder.feat_in = None
    torch.manual_seed(0)
    return CTCModel(cfg).eval()


def test_torchscript_equals_the_model_and_masks_padding(tmp_path):
    model = recurrent()
    audio_signal, length = example(model, 4, 251)
    with torch.inference_mode():
        encoded, lengths = model.encoder(audio_signal=audio_signal, length=length)
        expected = model.decoder(encoder_output=encoded)
    described = export_model(model, tmp_path / "sub" / "x.ts")
    run = torch.jit.load(str(tmp_path / "sub" / "x.ts"))
    found = run(audio_signal, length)
    assert found.shape == expected.shape
    for row, frames in enumerate(lengths.tolist()):
        assert torch.allclose(found[row, :frames], expected[row, :frames], atol=1e-4)
    assert described["padding"] == "masked" and described["format"] == "TorchScript"
    assert list(described["inputs"]) == ["audio_signal", "length"] and list(described["outputs"]) == ["logprobs"]
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["x.ts", "x.ts.json"]
    stored = json.loads((tmp_path / "sub" / "x.ts.json").read_text())
    assert stored == described and stored["labels"] == tiny.LABELS and stored["blank"] == 28
    assert stored["features"]["features"] == 16 and stored["subsampling_factor"] == 2


def test_onnx_is_a_valid_graph_with_named_inputs_and_free_sizes(tmp_path):
    import onnx

    described = export_model(recurrent(), tmp_path / "x.onnx")
    graph = onnx.load(str(tmp_path / "x.onnx"))
    assert [o.version for o in graph.opset_import if o.domain == ""] == [17] and described["format"] == "ONNX opset 17"
    inputs = {
        node.name: [d.dim_param or d.dim_value for d in node.type.tensor_type.shape.dim] for node in graph.graph.input
    }
    assert list(inputs) == ["audio_signal", "length"] == list(described["inputs"])
    assert inputs["audio_signal"][1] == 16 and all(isinstance(inputs["audio_signal"][k], str) for k in (0, 2))
    assert [node.name for node in graph.graph.output] == ["logprobs"]
    assert "within" in described["verified"] or "onnxruntime is not installed" in described["verified"]


def test_an_encoder_that_drops_its_masks_is_said_to(tmp_path):
    """NeMo turns the masks of ConvASREncoder off at export: right for one length, wrong for padded batches."""
    from recipes.decode import load_model

    tiny.model().save_to(str(tmp_path / "x.nemo"))
    described = export_model(load_model(tmp_path / "x.nemo", "cpu"), tmp_path / "x.ts")
    assert "not masked" in described["padding"] and "within" in described["verified"]


def test_a_network_that_computes_something_else_is_not_written(tmp_path):
    model = recurrent()
    forward = model.decoder.forward

    class Frozen(torch.nn.Module):
        """As a model would that keeps a size of the example as a constant."""

        def forward(self, encoder_output):
            if torch.jit.is_tracing():
                return forward(encoder_output=encoder_output) + 0.1
            return forward(encoder_output=encoder_output)

    model.decoder.forward = Frozen().forward
    with pytest.raises(ExportError, match="differ from the model's by 0.1, over"):
        export_model(model, tmp_path / "x.ts")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    tiny.model().save_to(str(tmp_path / "tiny.nemo"))
    assert export.main([f"model={tmp_path}/tiny.nemo", f"output={tmp_path}/tiny.pt"]) == 0
    out = capsys.readouterr().out
    assert "audio_signal" in out and "logprobs" in out and "float32 (B, 16, T)" in out
    assert (tmp_path / "tiny.pt").is_file()
    for arguments, said in (
        ([f"model={tmp_path}/tiny.nemo", "output=x.tflite"], "ends in .onnx, .ts, .pt"),
        ([f"model={tmp_path}/tiny.nemo"], "give output=..."),
        ([f"model={tmp_path}/none.nemo", "output=x.onnx"], "no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            export.main(arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1
