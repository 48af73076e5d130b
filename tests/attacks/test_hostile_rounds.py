"""A stranger speaks to the members of a round. What it may not do is refused; training goes on."""

import asyncio
import gc
from pathlib import Path

import pytest
import torch

from dipaco.compression import EncodedGradient, encode
from dipaco.digest import index_of
from dipaco.topology import ModuleID, PathID
from peer.archive import whole
from peer.courier import Answer, Kind
from peer.messages import (
    MAX_CONTRIBUTIONS,
    MAX_TOKENS,
    Ballot,
    Certificate,
    CertifyRequest,
    Done,
    HaveReply,
    HaveRequest,
    ProposeReply,
    ProposeRequest,
    Seat,
    Vote,
    sign,
)
from peer.reduction import reduce
from tests.attacks.stranger import (
    MODULE,
    ROUND_SECONDS,
    Stranger,
    advances,
    changed_proposal,
    next_proposal,
    serve_silently,
    swarm,
    take_seat,
)
from tests.lab import LabPeer, lab
from tests.little_run import little_config
from tests.virtual_clock import run_virtual


def test_no_vote_for_a_ballot_of_a_slot_to_come(tmp_path: Path) -> None:
    """A promise to it would bind its member against all ballots before it, restarts included."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            stranger = Stranger(place)
            await stranger.serve()
            certificate = stranger.node.log.held[MODULE].certificate
            assert certificate is not None
            roster = certificate.proposal.next_roster
            request = ProposeRequest(
                ballot=Ballot(slot=2**31, attempt=1000, leader=stranger.key.peer_id),
                proposal=next_proposal(stranger, stranger.commitment(MODULE), roster),
            )
            replies = await stranger.courier.ask_all(
                ProposeReply, {seat.peer: request for seat in roster}, Kind.PROPOSE, 30.0
            )
            assert len(replies) == len(roster)
            assert not any(reply.vote for reply in replies.values())
            await advances(place, MODULE)

    run_virtual(scenario())


def test_no_certificate_of_a_slot_to_come(tmp_path: Path) -> None:
    """Else anyone could say that a roster has long been due to be rebuilt, of itself alone."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            stranger = Stranger(place)
            await stranger.serve()
            node, key = stranger.node, stranger.key
            held = node.log.held[MODULE]
            assert held.certificate is not None
            proposal = next_proposal(
                stranger, stranger.commitment(MODULE), (Seat(peer=key.peer_id, path="0.0"),)
            )
            size = node.log.num_parameters(MODULE)
            gradient = EncodedGradient(
                encode(torch.full((size,), 1e-3), "float32"), "float32", num_parameters=size
            )
            update = reduce(proposal, node.log.load_state(MODULE), [gradient], node.manifest)
            result = index_of(update.encoded).digest
            slot = held.certificate.proposal.slot + 3
            assert slot > node.slot + 1
            ballot = Ballot(slot=slot, attempt=0, leader=key.peer_id)
            vote = Vote(peer=key.peer_id, ballot=ballot, proposal=proposal.digest, result=result)
            certificate = Certificate(
                proposal=proposal, ballot=ballot, result=result, votes=(sign(vote, key),)
            )
            request = CertifyRequest(certificate=certificate)
            everyone = {peer.peer_id: request for peer in stranger.honest}
            await stranger.courier.ask_all(Done, everyone, Kind.CERTIFY, 30.0)
            await advances(place, MODULE)
            for peer in stranger.honest:
                assert certificate.digest not in {e["certificate"] for e in peer.seen("version")}

    run_virtual(scenario())


def test_a_commitment_deletes_nothing_that_it_names(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            manifest = place.run.manifest
            node = Stranger(place, 200).node
            named = [
                node.log.held[MODULE].state,
                node.run,
                manifest.shard(PathID.parse("0.0")).blob.digest,
                manifest.tokenizer.digest,
            ]
            here = {d: [p for p in place.peers.values() if d in p.keeper.node.store] for d in named}
            assert all(here.values())
            for number, digest in enumerate(named):
                stranger = Stranger(place, 300 + number)
                await stranger.commit(stranger.commitment(MODULE, blob=digest))
            await asyncio.sleep(1.0)
            assert len(place.peers["peer0"].seen("fault")) >= len(named)
            for digest, peers in here.items():
                assert all(digest in peer.keeper.node.store for peer in peers)
            await asyncio.sleep(4 * ROUND_SECONDS)  # until the commitments are forgotten
            for digest in named[1:]:
                assert all(digest in peer.keeper.node.store for peer in here[digest])

    run_virtual(scenario())


@pytest.mark.parametrize("raw", [b"", b"too short"])
def test_a_commitment_to_bytes_of_another_size_is_a_fault_of_its_signer(
    tmp_path: Path, raw: bytes
) -> None:
    async def scenario() -> None:
        async with lab(tmp_path, little_config(), start_in=-1.0) as place:
            held = (await place.bootstrap()).keeper.node.log.held
            await place.until(lambda: MODULE in held, within=ROUND_SECONDS, what="a module")
            stranger = Stranger(place)
            await stranger.serve()
            unseen: list[dict[str, object]] = []
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: unseen.append(context))
            commitment = stranger.commitment(MODULE, blob=stranger.store.add(raw))
            await stranger.commit(commitment)
            await asyncio.sleep(2.0)
            gc.collect()
            assert not unseen
            [victim] = stranger.honest
            [fault] = victim.seen("fault")
            assert fault["peer"] == stranger.key.peer_id
            assert f"{len(raw)} bytes" in fault["why"]

    run_virtual(scenario())


@pytest.mark.parametrize(("value", "tokens"), [(3e38, 1), (1e-6, MAX_TOKENS)])
def test_no_contribution_is_too_large_for_those_who_count_it(
    tmp_path: Path, value: float, tokens: int
) -> None:
    """Neither a state that is not finite, nor more tokens than can be announced, comes of it."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            stranger = Stranger(place)
            await stranger.serve()
            for module in (MODULE, ModuleID(2, 0)):
                await stranger.commit(stranger.commitment(module, value=value, tokens=tokens))
            await advances(place, MODULE)
            await advances(place, ModuleID(2, 0))
            held = stranger.node.log.held[MODULE]
            state = await stranger.node.offload(lambda: stranger.node.log.load_state(MODULE))
            assert bool(torch.isfinite(state.parameters).all())
            counted = [c.proposal.contributors for c in held.chain]
            assert any(stranger.key.peer_id in peers for peers in counted) == (value < 1.0)
            for peer in place.peers.values():
                assert not [e for e in peer.seen("error") if e["where"] in ("presence", "duties")]

    run_virtual(scenario())


def test_who_claims_too_many_tokens_is_not_merged_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("attempt", "contributions", "merging"):
        monkeypatch.setattr(f"peer.{module}.MAX_COUNTED", 1)

    async def scenario() -> None:
        async with swarm(tmp_path, levels=(1,)) as place:
            peers = [place.peers["peer0"], await place.join("peer1", step_seconds=2.0)]
            stranger = Stranger(place)
            await stranger.serve()
            await place.until_versions(2, peers, within=3 * ROUND_SECONDS)
            node, last = stranger.node, stranger.node.slot + 4
            while node.slot < last:
                next_slot_time = node.history.first.slot_start(node.slot + 1)
                await asyncio.sleep(next_slot_time - node.now() - 0.5)
                large = stranger.commitment(MODULE, tokens=MAX_TOKENS)
                large = large.model_copy(update={"path": "0", "signature": ""})
                await stranger.commit(sign(large, stranger.key))
                await asyncio.sleep(1.0)
            await asyncio.sleep(ROUND_SECONDS / 2)
            merged = [e["parts"] for peer in peers for e in peer.seen("merged")]
            assert sorted(peer.peer_id for peer in peers) in map(sorted, merged)
            assert not any(stranger.key.peer_id in parts for parts in merged)
            assert not [e for peer in peers for e in peer.seen("error")]

    run_virtual(scenario())


@pytest.mark.parametrize("wrong", ["version", "state"])
def test_commitments_that_no_version_can_count_are_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Neither proposed, nor waited for, nor counted among what is too much to pull."""
    for module in ("attempt", "contributions", "merging"):
        monkeypatch.setattr(f"peer.{module}.MAX_COUNTED", 2)

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            strangers = [Stranger(place, 500 + number) for number in range(3)]
            node, member = strangers[0].node, strangers[0].honest[1].keeper.member
            if wrong == "version":
                for stranger in strangers:
                    await stranger.serve()
            trainers = {place.peers[name].peer_id for name in ("peer0", "peer1")}
            before = node.log.held[MODULE].version
            for _ in range(3):
                change = {"base_version": node.log.held[MODULE].version + 1, "signature": ""}
                if wrong == "state":
                    change |= {"base_version": 0, "base_state": "0" * 64}
                for stranger in strangers:
                    commitment = stranger.commitment(MODULE, tokens=MAX_TOKENS)
                    bad = sign(commitment.model_copy(update=change), stranger.key)
                    await stranger.commit(bad)
                await asyncio.sleep(ROUND_SECONDS)
                assert bad in member.contributions.known(MODULE, bad.slot)
            made = node.log.held[MODULE].after(before)
            assert [set(c.proposal.contributors) for c in made] == 3 * [trainers]

    run_virtual(scenario())


def test_strangers_who_are_first_with_all_a_round_can_hold_keep_no_trainer_out(
    tmp_path: Path,
) -> None:
    """They claim as much as they may, and send nothing when they are asked for it."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            strangers = [Stranger(place, 500 + number) for number in range(MAX_CONTRIBUTIONS)]
            for stranger in strangers:
                await serve_silently(stranger.transport)
            node, member = strangers[0].node, strangers[0].honest[1].keeper.member
            trainers = {place.peers[name].peer_id for name in ("peer0", "peer1")}
            next_slot_time = node.history.first.slot_start(node.slot + 1)
            await asyncio.sleep(next_slot_time - node.now() + 0.7 * ROUND_SECONDS)
            before = node.log.held[MODULE].version
            for _ in range(3):
                slot = node.slot
                for stranger in strangers:
                    await stranger.commit(stranger.commitment(MODULE, tokens=MAX_TOKENS))
                assert len(member.contributions.known(MODULE, slot)) == MAX_CONTRIBUTIONS
                await asyncio.sleep(ROUND_SECONDS)
                peers = {c.peer for c in member.contributions.known(MODULE, slot)}
                assert peers > trainers
            made = node.log.held[MODULE].after(before)
            assert [set(c.proposal.contributors) for c in made] == 3 * [trainers]

    run_virtual(scenario())


@pytest.mark.parametrize("module", [str(MODULE), "9.9"])
def test_a_member_with_an_old_certificate_does_not_end_attempts(
    tmp_path: Path, module: str
) -> None:
    """Be it one of another module, which nobody here holds."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            stranger = Stranger(place)
            node = stranger.node
            old = whole(node.log.held[MODULE].chain[0])
            proposal = old.proposal.model_copy(update={"module": module})
            old = old.model_copy(update={"proposal": proposal})
            asked = 0

            async def have(peer_id: str, payload: bytes) -> bytes:
                nonlocal asked
                asked += 1
                return HaveReply(
                    promised=False, held=(), commitments=(), certificate=old
                ).to_bytes()

            async def nothing(peer_id: str, payload: bytes) -> bytes:
                raise ValueError("no")

            answers: dict[Kind, Answer] = dict.fromkeys(Kind, nothing)
            await stranger.courier.serve({**answers, Kind.HAVE: have})
            for _ in range(10):  # until it has a seat, and is asked
                held = node.log.held[MODULE]
                assert held.certificate is not None
                await stranger.announce(
                    MODULE, version=held.version, certificate=held.certificate.digest
                )
                await asyncio.sleep(ROUND_SECONDS / 4)
            await advances(place, MODULE)
            assert asked
            assert not [e for peer in stranger.honest for e in peer.seen("error")]

    run_virtual(scenario())


@pytest.mark.parametrize("change", ["base", "slot"])
def test_no_vote_for_what_no_certificate_can_be_made_of(tmp_path: Path, change: str) -> None:
    """Votes for it would bind their members to it: the module would never have a version again."""

    async def scenario() -> None:
        async with swarm(tmp_path, levels=(1,)) as place:
            stranger = Stranger(place)
            await stranger.serve()
            roster = await take_seat(stranger)
            key, node = stranger.key, stranger.node
            certificate = node.log.held[MODULE].certificate
            assert certificate is not None
            before = certificate.proposal.slot
            what = {"base_state": "0" * 64} if change == "base" else {"slot": before}
            proposal = changed_proposal(stranger, roster, **what)
            ballot = Ballot(slot=node.slot, attempt=0, leader=key.peer_id)
            request = ProposeRequest(ballot=ballot, proposal=proposal)
            others = {peer.peer_id: request for peer in stranger.honest}
            await stranger.courier.ask_all(ProposeReply, others, Kind.PROPOSE, 30.0)
            for peer in stranger.honest:
                assert [e["why"] for e in peer.seen("fault") if f"wrong {change}" in e["why"]]
                assert proposal.digest not in {e["proposal"] for e in peer.seen("voted")}
            await advances(place, MODULE)

    run_virtual(scenario())


@pytest.mark.parametrize("lie", ["base", "later ballot"])
def test_a_member_that_says_what_it_cannot_have_voted_for_does_not_end_attempts(
    tmp_path: Path, lie: str
) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, levels=(1,)) as place:
            stranger = Stranger(place)
            await stranger.serve()
            asked = 0

            async def have(peer_id: str, payload: bytes) -> bytes:
                nonlocal asked
                asked += 1
                request = HaveRequest.from_bytes(payload, sender=peer_id)
                certificate = stranger.node.log.held[MODULE].certificate
                assert certificate is not None
                roster = certificate.proposal.next_roster
                slot = request.ballot.slot + (lie == "later ballot")
                what = {"base_state": "0" * 64} if lie == "base" else {"slot": slot}
                return HaveReply(
                    promised=True,
                    held=(),
                    commitments=(),
                    accepted=changed_proposal(stranger, roster, **what),
                    accepted_ballot=Ballot(slot=slot, attempt=0, leader=stranger.key.peer_id),
                ).to_bytes()

            async def nothing(peer_id: str, payload: bytes) -> bytes:
                raise ValueError("no")

            answers: dict[Kind, Answer] = dict.fromkeys(Kind, nothing)
            await stranger.courier.serve({**answers, Kind.HAVE: have})
            await take_seat(stranger)
            await advances(place, MODULE)
            assert asked
            faults = [e for peer in stranger.honest for e in peer.seen("fault")]
            assert "BadMessage" in {e["kind"] for e in faults if e["peer"] == stranger.key.peer_id}

    run_virtual(scenario())


def test_a_promise_that_is_overtaken_while_bytes_are_pulled_is_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, levels=(1,)) as place:
            stranger = Stranger(place)
            await take_seat(stranger)
            victim, node = place.peers["peer0"].keeper, stranger.node
            held = node.log.held[MODULE]
            missing = stranger.commitment(MODULE).model_copy(update={"path": "0", "signature": ""})
            requests = [
                HaveRequest(
                    run=node.run,
                    module=str(MODULE),
                    version=held.version + 1,
                    parent=held.parent,
                    ballot=Ballot(slot=node.slot, attempt=attempt, leader=stranger.key.peer_id),
                    commitments=(sign(missing, stranger.key),),
                    wait_seconds=0.5,
                )
                for attempt in range(2)
            ]
            asked = (victim.member.have(r, sender=stranger.key.peer_id) for r in requests)
            first, second = await asyncio.gather(*asked)
            assert second.promised
            assert not first.promised

    run_virtual(scenario())


def test_liars_about_versions_do_not_keep_a_newcomer_at_the_start(tmp_path: Path) -> None:
    """As many as one catch-up asks claim a version that nobody has."""

    async def scenario() -> None:
        async with swarm(tmp_path) as place:
            for number in range(4):
                stranger = Stranger(place, 400 + number)
                for module in place.run.manifest.topology.modules:
                    if module in stranger.node.log.held:
                        await stranger.announce(module, version=99, certificate="a" * 64)
            late = await place.join("late", step_seconds=2.0)
            await place.until_versions(3, [late], within=8 * ROUND_SECONDS)
            assert late.seen("fault")

    run_virtual(scenario())


def test_many_messages_about_another_version_are_one_catch_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, levels=(1,)) as place:
            stranger = Stranger(place)
            victim: LabPeer = place.peers["peer0"]
            request = HaveRequest(
                run=stranger.node.run,
                module=str(MODULE),
                version=1000,
                parent="a" * 64,
                ballot=Ballot(slot=0, attempt=0, leader=stranger.key.peer_id),
                commitments=(),
                wait_seconds=0.0,
            )
            before = len(victim.keeper.background._tasks)
            asked = [
                stranger.courier.ask(
                    victim.peer_id, Kind.HAVE, request.to_bytes(), timeout_seconds=10.0
                )
                for _ in range(64)
            ]
            replies = await asyncio.gather(*asked, return_exceptions=True)
            assert any(isinstance(reply, bytes) for reply in replies)
            assert len(victim.keeper.background._tasks) <= before + 2

    run_virtual(scenario())
