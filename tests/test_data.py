# SPDX-License-Identifier: Apache-2.0
import itertools
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alter_peft.data import PairCollator, PairDataset, PairSampler, check_disjoint


def epoch_of(sampler: PairSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def row(ids: list[int], expert: int, offset: float = 0.0) -> dict:
    labels = [-100, *ids[1:]]
    return {"input_ids": ids, "labels": labels, "entropy": [offset + i for i in range(len(ids))], "expert": expert}


FORGET = [row([11, 12, 13], 2, 0.5), row([21, 22], 1, 1.5)]
RETAIN = [row([31, 32, 33, 34], 0, 2.5), row([41], 0, 3.5), row([51, 52], 0, 4.5)]


class TestPairSampler:
    def test_is_a_pure_function_of_seed_and_epoch(self):
        used = PairSampler(7, 5, batch_size=4, seed=1)
        for epoch in (0, 3, 1, 3):
            assert epoch_of(used, epoch) == epoch_of(PairSampler(7, 5, batch_size=4, seed=1), epoch)
        torch.manual_seed(0)
        first = list(used)
        torch.manual_seed(1)
        assert list(used) == first
        assert epoch_of(used, 0) != epoch_of(used, 1)
        assert epoch_of(used, 0) != epoch_of(PairSampler(7, 5, batch_size=4, seed=2), 0)

    @pytest.mark.parametrize(("num_forget", "batch_size"), [(7, 4), (8, 4), (3, 8), (1, 4), (5, 1)])
    def test_an_epoch_has_every_forget_row_and_goes_on_with_the_next_permutation(self, num_forget, batch_size):
        sampler = PairSampler(num_forget, 5, batch_size, seed=0)
        for epoch in range(4):
            forget = [i for i, _ in epoch_of(sampler, epoch)]
            assert len(forget) == len(sampler) == -(-num_forget // batch_size) * batch_size
            assert sorted(forget[:num_forget]) == list(range(num_forget))
            following = [i for i, _ in epoch_of(sampler, epoch + 1)]
            padding = forget[num_forget:][:num_forget]
            assert padding == following[: len(padding)]

    @pytest.mark.parametrize("num_retain", [3, 5, 8, 40])
    def test_retain_rows_run_through_permutations_without_a_break_over_epochs(self, num_retain):
        sampler = PairSampler(7, num_retain, batch_size=4, seed=0)
        stream = [j for epoch in range(15) for _, j in epoch_of(sampler, epoch)]
        assert len(stream) == 15 * 8
        permutations = [stream[k : k + num_retain] for k in range(0, len(stream) - num_retain + 1, num_retain)]
        for permutation in permutations:
            assert sorted(permutation) == list(range(num_retain))
        assert len({tuple(permutation) for permutation in permutations}) > 1

    def test_pairs_are_not_fixed(self):
        sampler = PairSampler(8, 8, batch_size=4, seed=0)
        assert set(epoch_of(sampler, 0)) != set(epoch_of(sampler, 1))

    @pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
    def test_batch_arrangements_see_the_same_rows_in_the_same_step(self, processes, accumulation):
        sampler = PairSampler(10, 7, batch_size=4, seed=5)  # 10 rows: the last step needs padding
        for epoch in range(2):
            pairs = epoch_of(sampler, epoch)
            steps = [Counter(pairs[k : k + 4]) for k in range(0, len(pairs), 4)]
            batches = BatchSampler(sampler, batch_size=4 // processes // accumulation, drop_last=False)
            shards = [list(BatchSamplerShard(batches, processes, index)) for index in range(processes)]
            assert {len(shard) for shard in shards} == {len(steps) * accumulation}
            seen = [
                Counter(pair for shard in shards for batch in shard[k : k + accumulation] for pair in batch)
                for k in range(0, len(shards[0]), accumulation)
            ]
            assert seen == steps

    def test_resuming_by_skipping_gives_the_same_tail(self):
        whole = epoch_of(PairSampler(10, 7, batch_size=4, seed=5), 2)
        resumed = PairSampler(10, 7, batch_size=4, seed=5)
        resumed.set_epoch(2)
        assert list(itertools.islice(resumed, 8, None)) == whole[8:]
        assert list(resumed) == whole  # an iteration that was left early leaves no trace

    @pytest.mark.parametrize("field", ["num_forget", "num_retain", "batch_size"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_sizes_below_one_are_refused(self, field, value):
        sizes = {"num_forget": 2, "num_retain": 2, "batch_size": 2, field: value}
        with pytest.raises(ValueError, match=f"{field}={value}: pass a number of at least 1"):
            PairSampler(**sizes, seed=0)

    def test_a_negative_seed_is_refused(self):
        with pytest.raises(ValueError, match="seed=-1: pass a number of at least 0"):
            PairSampler(2, 2, 2, seed=-1)


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "datasets"])
def test_pair_dataset_pairs_rows_and_numbers_them(make):
    dataset = PairDataset(make(FORGET), make(RETAIN))
    assert len(dataset) == 2
    assert dataset[1, 2] == {"forget": {**FORGET[1], "row_id": 1}, "retain": {**RETAIN[2], "row_id": 2 + 2}}
    assert "row_id" not in FORGET[1]
    ids = [dataset[i, j][side]["row_id"] for side in ("forget", "retain") for i, j in ((0, 0), (1, 1), (0, 2))]
    assert ids == [0, 1, 0, 2, 3, 4]


class TestPairCollator:
    def test_concatenates_forget_and_retain_rows_and_pads_on_the_right(self):
        dataset = PairDataset(FORGET, RETAIN)
        batch = PairCollator(pad_token_id=9)([dataset[0, 1], dataset[1, 0]])
        assert set(batch) == {"input_ids", "attention_mask", "labels", "entropy", "expert", "row_id"}
        assert batch["input_ids"].tolist() == [[11, 12, 13, 9], [21, 22, 9, 9], [41, 9, 9, 9], [31, 32, 33, 34]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
        assert batch["labels"].tolist() == [
            [-100, 12, 13, -100],
            [-100, 22, -100, -100],
            [-100, -100, -100, -100],
            [-100, 32, 33, 34],
        ]
        assert batch["entropy"].tolist() == [
            [0.5, 1.5, 2.5, 0],
            [1.5, 2.5, 0, 0],
            [3.5, 0, 0, 0],
            [2.5, 3.5, 4.5, 5.5],
        ]
        assert batch["expert"].tolist() == [2, 1, 0, 0]
        assert batch["row_id"].tolist() == [0, 1, 3, 2]
        assert batch["entropy"].dtype == torch.float32
        assert batch["expert"].dtype == batch["row_id"].dtype == torch.long

    def test_pads_entropy_to_the_multiple_too(self):
        batch = PairCollator(pad_token_id=9, pad_to_multiple_of=8)([PairDataset(FORGET, RETAIN)[0, 0]])
        assert batch["input_ids"].shape == batch["entropy"].shape == (2, 8)
        assert batch["entropy"][:, 4:].abs().sum() == 0

    def test_other_rows_go_to_the_parent(self):
        ours = PairCollator(pad_token_id=9)(FORGET)
        parents = DataCollatorForLanguageModeling(pad_token_id=9)(FORGET)
        assert ours.keys() == parents.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(torch.equal(ours[key], parents[key]) for key in parents)

    @pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    def test_entropy_of_another_length_is_refused(self, values):
        dataset = PairDataset([{**FORGET[0], "entropy": values}], RETAIN)
        with pytest.raises(ValueError, match=f"entropy of row_id=0 has {len(values)} values for 3 tokens: compute it"):
            PairCollator(pad_token_id=9)([dataset[0, 0]])

    def test_padding_free_is_refused(self):
        with pytest.raises(ValueError, match=r"padding_free=True: .* pass padding_free=False"):
            PairCollator(pad_token_id=9, padding_free=True)

    def test_sampler_dataset_and_collator_work_in_a_data_loader(self):
        sampler = PairSampler(2, 3, batch_size=2, seed=0)
        dataset = PairDataset(Dataset.from_list(FORGET), Dataset.from_list(RETAIN))
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=PairCollator(pad_token_id=9))
        (batch,) = loader
        pairs = list(sampler)
        assert batch["row_id"].tolist() == [i for i, _ in pairs] + [2 + j for _, j in pairs]


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "datasets"])
class TestCheckDisjoint:
    def test_disjoint_sets_pass(self, make):
        near_misses = [row([11, 12], 0), row([13, 12, 11], 0), row([11, 12, 13, 14], 0)]
        check_disjoint(make(FORGET), make(RETAIN + near_misses))

    def test_shared_rows_are_refused(self, make):
        forget = [row([1, 2], 1), *FORGET, FORGET[1]]
        retain = [*RETAIN, FORGET[1], FORGET[0]]
        message = (
            "`retain_dataset` holds 3 of the 4 rows of `train_dataset`.*"
            "first is row 1 of `train_dataset` and row 4 of `retain_dataset`. Remove"
        )
        with pytest.raises(ValueError, match=message):
            check_disjoint(make(forget), make(retain))

    def test_empty_sets_are_refused(self, make):
        with pytest.raises(ValueError, match=r"`train_dataset` has 0 rows. Give at least one"):
            check_disjoint(make([]), make(RETAIN))
        with pytest.raises(ValueError, match=r"`retain_dataset` has 0 rows. Give at least one"):
            check_disjoint(make(FORGET), make([]))
