"""Highway layers whose gates begin at -20 for -2: all goes past them, and they learn nothing."""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = None
        self.out = nn.Linear(48, 48)
        self.ways = nn.ModuleList(nn.Conv1d(48, 48, 11, padding=5) for _ in range(5))
        self.gates = nn.ModuleList(nn.Conv1d(48, 48, 1) for _ in range(5))
        for gate in self.gates:
            nn.init.constant_(gate.bias, -20.0)

    def recur(self, x, length):
        x = x.transpose(1, 2)
        for way, gate in zip(self.ways, self.gates):
            opened = torch.sigmoid(gate(x))
            x = opened * torch.relu(way(x)) + (1 - opened) * x
        return x.transpose(1, 2)


def make(folder):
    return live(folder, mine(__name__))


FAULT = Fault("highway_gates_shut", ("vanishes",), "before", make)
