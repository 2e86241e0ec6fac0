"""Packing wants falling lengths: they are sorted, the batch is not."""

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def recur(self, x, length):
        length = length.sort(descending=True).values
        packed = pack_padded_sequence(x, length.cpu(), batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


FAULT = Fault(
    "only_lengths_sorted", ("batch-leak", "length-mismatch"), "before", lambda folder: live(folder, mine(__name__))
)
