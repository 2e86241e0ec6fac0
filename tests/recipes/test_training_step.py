"""What happens to a batch on its way to the loss: only in training, only as the configuration says."""

import pytest
import torch
from nemo.collections.asr.models import ASRModel
from nemo.core.classes.mixins import AccessMixin
from omegaconf import open_dict
from torch.utils.data import DataLoader, Dataset

from recipes.ctc_model import CTCModel, CTCModelBPE
from recipes.data import SampledPieces
from recipes.intermediate import characters_of
from tests.recipes import tiny

TEXT = "the cat sat on the mat"
CONFORMER = {"_target_": "recipes.conformer.encoder.ConformerEncoder", "feat_in": 16, "n_layers": 2, "d_model": 24,
             "n_heads": 2, "conv_kernel_size": 5, "conv_norm_type": "layer_norm", "subsampling_conv_channels": 4,
             "dropout": 0.0, "dropout_pre_encoder": 0.0}


DEEPSPEECH2 = {"_target_": "recipes.deepspeech2.encoder.DeepSpeech2Encoder", "feat_in": 16, "conv_channels": [4],
               "conv_kernels": [[3, 3]], "conv_strides": [[2, 2]], "rnn_layers": 2, "rnn_hidden": 24,
               "rnn_norm": "layer", "dropout": 0.0}
INNER = {"loss_weights": [0.3], "apply_at_layers": [0]}


def build(cfg=None, **sections) -> CTCModel:
    """The tiny model with other sections, ready for `training_step` without a trainer, nothing drawn at random."""
    of_class = CTCModelBPE if cfg else CTCModel
    cfg = cfg or tiny.config()
    with open_dict(cfg):
        cfg.preprocessor.dither, cfg.spec_augment = 0.0, None
        for name, section in sections.items():
            cfg[name] = section
    torch.manual_seed(0)
    model = of_class(cfg).train()
    model._optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.log_dict = lambda *args, **kwargs: None
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(2, 16000, generator=generator) * 0.1
    return [audio, torch.tensor([16000, 16000]), torch.randint(1, 27, (2, 5), generator=generator),
            torch.tensor([5, 4]), ["a", "b"]]


@pytest.mark.parametrize("encoder", [CONFORMER, DEEPSPEECH2])
def test_the_loss_a_character_is_the_last_layers_and_what_is_learned_from_the_mixture(encoder):
    model = build(encoder=encoder, interctc=INNER)
    audio, lengths, targets, sizes, _ = batch()
    learned = model.training_step(batch(), 0)["loss"].detach()
    log_probs, frames, _ = model.forward(input_signal=audio, input_signal_length=lengths)
    last = model.loss(log_probs, targets, frames, sizes).detach()
    torch.testing.assert_close(model.step_stats.loss_per_char, last)
    torch.testing.assert_close(model.step_stats.loss, learned)
    assert abs(float(learned - last)) > 1e-3


def test_what_a_recurrent_layer_leaves_to_the_intermediate_loss_ends_with_the_utterance():
    model = build(encoder=DEEPSPEECH2, interctc=INNER)
    features, lengths = torch.randn(2, 16, 60), torch.tensor([60, 31])
    AccessMixin.set_access_enabled(access_enabled=True, guid=model.model_guid)
    _, frames = model.encoder(audio_signal=features, length=lengths)
    registry = AccessMixin.get_module_registry(model.encoder)
    [output] = next(iter(registry.values()))["interctc/layer_output_0"]
    assert output.shape == (2, 24, 30) and frames.tolist() == [30, 16]
    assert bool((output[1, :, 16:] == 0).all()) and bool((output[1, :, :16] != 0).any(dim=0).all())


def test_the_intermediate_loss_over_tokens_spells_in_characters(tmp_path):
    labels = [" ", *"abcdefghijklmnopqrstuvwxyz"]
    model = build(tiny.bpe_config(tmp_path), encoder=CONFORMER, interctc=INNER, intermediate_labels=labels)
    encode = SampledPieces(model.tokenizer, 0.3)
    texts = [encode(TEXT), encode("the dog ran")]
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    characters, sizes = characters_of(targets, torch.tensor([len(t) for t in texts]), model.tokenizer, labels)
    assert sizes.tolist() == [len(TEXT), 11] and not characters[1, 11:].any()
    assert "".join(labels[c] for c in characters[0]) == TEXT
    assert "".join(labels[c] for c in characters[1, :11]) == "the dog ran"
    audio = torch.randn(2, 32000) * 0.1
    step = [audio, torch.tensor([32000, 32000]), targets, torch.tensor([len(t) for t in texts]), ["a", "b"]]
    model.training_step(step, 0)["loss"].backward()
    assert float(model.character_decoder.decoder_layers[0].weight.grad.abs().sum()) > 0
    model.save_to(str(tmp_path / "m.nemo"))
    restored = ASRModel.restore_from(str(tmp_path / "m.nemo"))
    assert restored.character_decoder.num_classes_with_blank == 28
    assert build(tiny.bpe_config(tmp_path), encoder=CONFORMER, intermediate_labels=labels).character_decoder is None


def test_characters_that_fit_into_no_intermediate_output_are_named_once(tmp_path, monkeypatch):
    """Tokens fit into frames in which the characters of the same text do not."""
    labels = [" ", *"abcdefghijklmnopqrstuvwxyz"]
    model = build(tiny.bpe_config(tmp_path), encoder=CONFORMER, interctc=INNER, intermediate_labels=labels)
    targets = torch.tensor([model.tokenizer.text_to_ids("the cat sat on the mat")])
    said = []
    monkeypatch.setattr("recipes.ctc_model.log.warning", said.append)
    frames = 16  # after the encoder's subsampling: of over 20 characters and of as many tokens as there are
    assert targets.shape[1] < frames
    step = [torch.randn(1, 640 * frames) * 0.1, torch.tensor([640 * frames]), targets, torch.tensor([targets.shape[1]]), ["a"]]
    for _ in range(2):
        loss = model.training_step(step, 0)["loss"]
    assert torch.isfinite(loss) and not model.infeasible_seen and model.characters_infeasible_seen == {"a"}
    assert len(said) == 1 and said[0].startswith("utterance a: 22 characters")
    assert "left out of the intermediate loss" in said[0]


@pytest.mark.parametrize("rooms, noise", [(1.0, 0.0), (0.0, 1.0)])
def test_rooms_and_noise_are_heard_in_training_and_never_in_validation(rooms, noise):
    model = build(noise_and_rooms={"_target_": "recipes.noise.NoiseAndRooms", "room_probability": rooms,
                                   "noise_probability": noise})
    heard = []
    model.preprocessor.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs["input_signal"].clone()), with_kwargs=True
    )
    model.training_step(batch(), 0)
    model._validation_rows = [{"text": "a"}, {"text": "b"}]
    model.eval().validation_pass((batch(), [0, 1]), 0)
    trained, validated = heard
    assert all(not torch.equal(a, b) for a, b in zip(trained, batch()[0])) and torch.equal(validated, batch()[0])


def test_a_file_without_the_section_and_one_that_would_run_something_else(tmp_path):
    assert build().noise_and_rooms is None
    with pytest.raises(Exception, match="subprocess.call"):
        build(noise_and_rooms={"_target_": "subprocess.call", "args": ["touch", str(tmp_path / "run")]})
    assert not (tmp_path / "run").exists()


def bpe_model(folder, dropout):
    cfg = tiny.bpe_config(folder)
    with open_dict(cfg):
        cfg.bpe_dropout = dropout
    torch.manual_seed(7)
    return CTCModelBPE(cfg)


def test_bpe_dropout_spells_a_text_in_training_anew_each_time_and_never_elsewhere(tmp_path):
    model = bpe_model(tmp_path, 0.3)
    usual = model.text_encoder()(TEXT)
    assert all(model.text_encoder()(TEXT) == usual for _ in range(20))
    encode = model.training_text_encoder()
    drawn = [encode(TEXT) for _ in range(20)]
    assert len({tuple(ids) for ids in drawn}) > 3 and max(map(len, drawn)) > len(usual)
    assert all(model.tokenizer.ids_to_text(ids) == TEXT for ids in drawn)
    again, other_rank = (SampledPieces(model.tokenizer, 0.3, rank) for rank in (0, 1))
    assert [again(TEXT) for _ in range(20)] == drawn  # torch's seed is still the same
    assert [other_rank(TEXT) for _ in range(20)] != drawn
    for none in (0.0, None):
        model._cfg.bpe_dropout = none
        assert model.training_text_encoder()(TEXT) == usual


class Spelled(Dataset):
    """The same text ten times."""

    def __init__(self, encode):
        self.encode = encode

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.encode(TEXT)


def test_workers_and_epochs_draw_otherwise(tmp_path):
    encode = bpe_model(tmp_path, 0.3).training_text_encoder()
    loader = DataLoader(Spelled(encode), batch_size=None, num_workers=2)
    first, second = list(loader), list(loader)
    assert first[0::2] != first[1::2] and first != second


def test_bpe_dropout_is_refused_for_other_tokenizers(tmp_path):
    import sentencepiece

    model = bpe_model(tmp_path, 0.1)
    unigram = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(unigram), vocab_size=20, model_type="unigram",
        hard_vocab_limit=False, minloglevel=2,
    )
    model.tokenizer.tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{unigram}.model")
    for tokenizer in (model.tokenizer, object()):
        with pytest.raises(ValueError, match="set model.bpe_dropout=0"):
            SampledPieces(tokenizer, 0.1)
