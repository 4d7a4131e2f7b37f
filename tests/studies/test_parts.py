"""Study 11: layers that change places, and what a clamp leaves."""

import pandas as pd
import pytest
import torch
from small import network

from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme, make_qconfig
from labcore.quantize import calibrate, fuse, layers, prepare_ptq, simulate
from labcore.studies.parts import SWITCHES, LayersOf, bits_left, rules_apart


@pytest.fixture
def twins(batches):
    def simulated(weight: Scheme):
        qconfig = make_qconfig(weight, RECOMMENDED[1], "simulated")
        return simulate(calibrate(prepare_ptq(network(), qconfig), batches))

    return simulated(RECOMMENDED[0]), simulated(Scheme(bits=3))


def test_a_network_takes_some_layers_of_its_twin_and_gives_them_back(twins, batches):
    own, twin = twins
    names = list(layers(fuse(network())))
    choice, x = LayersOf(own, twin, names), batches[0]
    with torch.no_grad():
        alone, other = own(x).clone(), twin(x)
        assert not torch.equal(alone, other)
        assert torch.equal(choice.take(names)(x), other), (
            "all of the twin's weights, and the same activations"
        )
        one = choice.take(names[:1])(x).clone()
        assert not torch.equal(one, alone) and not torch.equal(one, other)
        assert torch.equal(choice.take([])(x), alone)


def test_the_clamp_leaves_as_many_bits_fewer_as_the_exponent_lies_below_it():
    rows = [("a", "weight", -13), ("b", "weight", -8), ("c", "weight", -7), ("d", "weight", -23)]
    rows += [("a", "activation", -20)]
    left = bits_left(pd.DataFrame(rows, columns=["layer", "tensor", "exponent"]))
    assert left["bits"].to_dict() == {"a": 3, "b": 8, "c": 8, "d": 0}
    assert left["wanted"].to_dict() == {"a": -13, "b": -8, "c": -7, "d": -23}


def test_each_rule_meets_itself_and_floats_and_nothing_twice():
    pairs = rules_apart()
    assert len(pairs) == 13 and pairs["nearest, clamped", "nearest, clamped"] == (REFERENCE, REFERENCE)
    assert pairs["float scales", "up"] == (FLOAT, Scheme(rule="ceil"))
    assert all("float scales" in pair for pair in pairs if pair[0] != pair[1])


def test_each_switch_is_one_change_to_the_recommendation():
    assert len(set(SWITCHES.values())) == len(SWITCHES) == 7 and SWITCHES["recommended"] == RECOMMENDED

    def changes(schemes) -> int:
        pairs = zip(schemes, RECOMMENDED, strict=True)
        return sum(vars(one)[key] != vars(best)[key] for one, best in pairs for key in vars(best))

    assert [changes(schemes) for schemes in SWITCHES.values()] == [0, 1, 1, 1, 1, 2, 2]
