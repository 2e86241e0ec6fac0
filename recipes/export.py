"""The network of a saved model as ONNX or TorchScript, to run without NeMo.

    python recipes/export.py model=x.nemo output=x.onnx        (or x.ts, x.pt: TorchScript)

What is exported takes features, not audio: the mel spectrogram is not part of it. `x.onnx.json` beside it says how the
features are made, what goes in and out, and what the outputs stand for. Before anything gets its final name the outputs
are compared with the model's, at another batch size and other lengths than the exporter saw: TorchScript by torch,
ONNX by onnxruntime where that is installed (else only the graph is checked).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from manifests.schema import write_atomic
from recipes.options import EXIT_FAILED, EXIT_USAGE, UsageError, existing_model, fail, parse, required
from recipes.quiet import quiet_imports
from recipes.threads import set_threads

OPSET = 17  # what the legacy exporter of the pinned torch writes without loss
KINDS = {".onnx": "ONNX", ".ts": "TorchScript", ".pt": "TorchScript"}
TOLERANCE = 1e-3  # on log-probs


@dataclass
class Options:
    """What `python recipes/export.py` takes."""

    model: str = required(".nemo file, Lightning .ckpt, or a recipe's name for its pretrained one")
    output: str = required("file to write: .onnx, or .ts or .pt for TorchScript")


class ExportError(RuntimeError):
    """An export that cannot be made or does not compute what the model computes. The message is one line."""


def example(model, batch: int, frames: int):
    """Random features (B, D, T) and lengths (B), the first item full and the others shorter."""
    import torch

    features = getattr(model.encoder, "_feat_in", None) or model.preprocessor.featurizer.nfilt
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([frames - (i * frames) // (2 * batch) for i in range(batch)])
    audio_signal = torch.randn(batch, features, frames, generator=generator)
    for row, length in enumerate(lengths):
        audio_signal[row, :, length:] = 0.0
    return audio_signal, lengths


def export_model(model, output: Path) -> dict:
    """Exports on the CPU and verifies; returns what is also written to OUTPUT.json.

    NeMo's exporter changes the model in place (it freezes parameters and turns masks of some encoders off): load it
    again for anything else. Raises ExportError where the exporter fails or the outputs differ; nothing is written then.
    """
    from recipes.decode import evaluation_mode

    kind = KINDS[output.suffix]
    output.parent.mkdir(parents=True, exist_ok=True)
    model.to("cpu")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder, evaluation_mode(model):
        part = Path(folder) / f"network{output.suffix}"
        expected = [_expect(model, *example(model, batch, frames)) for batch, frames in ((3, 333), (1, 128))]
        try:
            if hasattr(model, "ctc_decoder"):
                model.set_export_config({"decoder_type": "ctc"})  # a hybrid model would export its transducer
            # Several items of unequal length: a tracer may take a batch of one for a constant.
            model.export(str(part), input_example=example(model, 2, 200), onnx_opset_version=OPSET)
        except Exception as error:  # torch's exporters have many kinds, of many lines
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"{kind} export of {type(model).__name__} failed: {reason}") from error
        inputs, run = (_open_onnx if kind == "ONNX" else _open_torchscript)(part)
        described = _describe(model, kind, inputs, _compare(run, expected) if run else None)
        os.replace(part, output)
    write_atomic(output.with_name(output.name + ".json"), (json.dumps(described, indent=2) + "\n").encode())
    return described


def _expect(model, audio_signal, length):
    """The features and lengths, with the model's own log-probs (B, T', V+1) and output lengths."""
    import torch

    with torch.inference_mode():
        encoded_BDT, encoded_lengths = model.encoder(audio_signal=audio_signal, length=length)
        decoder = model.ctc_decoder if hasattr(model, "ctc_decoder") else model.decoder
        return audio_signal, length, decoder(encoder_output=encoded_BDT), encoded_lengths.tolist()


def _open_torchscript(part: Path):
    import torch

    return ["audio_signal", "length"], torch.jit.load(str(part))


def _open_onnx(part: Path):
    """(names of the inputs, function or None where onnxruntime is not installed)."""
    import onnx

    onnx.checker.check_model(str(part))
    names = [node.name for node in onnx.load(str(part)).graph.input]
    try:
        import onnxruntime
    except ImportError:
        return names, None
    import torch

    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])

    def run(audio_signal, length):
        given = {"audio_signal": audio_signal.numpy(), "length": length.numpy()}
        return torch.from_numpy(session.run(None, {name: given[name] for name in names})[0])

    return names, run


def _compare(run, expected: list) -> tuple[float, float]:
    """Largest difference of log-probs on items (without, with) padding. Raises ExportError for those without."""
    worst = [0.0, 0.0]
    for audio_signal, length, expected_BTV, encoded_lengths in expected:
        exported_BTV = run(audio_signal, length)
        if exported_BTV.shape != expected_BTV.shape:
            raise ExportError(
                f"the exported network gives {tuple(exported_BTV.shape)} for features {tuple(audio_signal.shape)}, the "
                f"model {tuple(expected_BTV.shape)}: a size was frozen at export"
            )
        for row, frames in enumerate(encoded_lengths):  # what is beyond the length means nothing
            difference = float((exported_BTV[row, :frames] - expected_BTV[row, :frames]).abs().max())
            padded = int(length[row]) < audio_signal.shape[2]
            worst[padded] = difference if not difference <= worst[padded] else worst[padded]  # a NaN stays
    if not worst[0] <= TOLERANCE:
        raise ExportError(f"log-probs exported differ from the model's by {worst[0]:.3g}, over {TOLERANCE}")
    return worst[0], worst[1]


def _describe(model, kind: str, inputs: list[str], differences: tuple[float, float] | None) -> dict:
    from omegaconf import OmegaConf

    from recipes.decode import ctc_head

    tokens = [str(token) for token in ctc_head(model)[0].vocabulary]
    features = example(model, 1, 2)[0].shape[1]
    meanings = {
        "audio_signal": f"float32 (B, {features}, T): features as described below, padded with zeros",
        "length": "int64 (B): feature frames of each item",
    }
    factor = getattr(model.encoder, "subsampling_factor", None)
    if differences is None:
        verified = "graph checked by onnx; outputs not compared, onnxruntime is not installed"
        padding = "not checked"
    else:
        verified = f"log-probs within {differences[0]:.1e} of the model's, at another batch size and lengths"
        padding = "masked" if differences[1] <= TOLERANCE else "not masked: give utterances of one length in a batch"
    return {
        "format": f"{kind} opset {OPSET}" if kind == "ONNX" else kind,
        "inputs": {name: meanings[name] for name in inputs},
        "outputs": {"logprobs": f"float32 (B, T', {len(tokens) + 1}): natural log-probabilities, T' output frames"},
        "padding": "not masked: the network takes no lengths, give utterances of one length" if "length" not in inputs
        else padding,
        "verified": verified,
        "subsampling_factor": int(factor) if factor is not None else None,
        "labels": tokens,
        "blank": len(tokens),
        "features": OmegaConf.to_container(model.cfg.preprocessor, resolve=True),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit status."""
    try:
        options = parse(Options, list(sys.argv[1:] if arguments is None else arguments), __doc__)
        path = existing_model(options.model)
        output = Path(options.output).expanduser()
        if output.suffix not in KINDS:
            raise UsageError(f"output={output}: give a name that ends in {', '.join(KINDS)}")
    except UsageError as error:
        fail("export.py", error, EXIT_USAGE)
    set_threads()
    quiet_imports()
    from recipes.decode import ModelError, load_model

    try:
        described = export_model(load_model(path, "cpu"), output)
    except (ModelError, ExportError, OSError) as error:
        fail("export.py", error, EXIT_FAILED)
    print(f"{output}: {described['format']}, {described['verified']}")
    for direction in ("inputs", "outputs"):
        for name, meaning in described[direction].items():
            print(f"  {direction[:-1]:<6}  {name:<12}  {meaning}")
    print(f"  padding: {described['padding']}")
    print(f"  labels, blank and features: {output}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
