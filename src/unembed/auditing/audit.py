"""The audit: what is in the store, how an attacker would read it, how much that gives him."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unembed.auditing.attacks import (
    WITH_CALLS,
    WITH_MAP,
    WITH_PAIRS,
    Align,
    Attack,
    Corpus,
    FitAlign,
    Progress,
    fit_pairs,
    inversion,
    lookup,
    run_attack,
    split_pairs,
    word_probe,
)
from unembed.auditing.conclude import Conclusion
from unembed.auditing.identify import identify
from unembed.auditing.result import AuditReport
from unembed.auditing.scoring import make_records
from unembed.auditing.sensitive import make_finder
from unembed.decoding import Decoding
from unembed.decoding.settings import as_decoding
from unembed.encoders import as_encoder, load_encoder
from unembed.encoders.alignment import Alignment
from unembed.encoders.base import Encoder
from unembed.errors import (
    ConfigError,
    StoreError,
    UnembedError,
    require_callable,
    require_path,
    require_switch,
    require_text,
    require_whole,
)
from unembed.evaluation.cache import as_folder, unfinished_folder
from unembed.inverter import Inverter
from unembed.vectors.invert import as_inverter
from unembed.vectors.stores.address import open_store
from unembed.vectors.stores.store import Store, VectorBatch
from unembed.vectors.words import WordProbe, shipped_probes

_CALL_ROWS = 32  # records the encoder is called for
_LEAST_PAIRS = 4


def audit(  # noqa: PLR0913 - the front door; all but the first have a default
    store: Store | str | Path,
    *,
    sample: int = 1000,
    seed: int = 0,
    to: Inverter | str | Path = "minilm",
    encoder: Encoder | str | Path | None = None,
    decoding: Decoding | str = "greedy",
    align: Align | Path | str | None = None,
    align_from_store: int = 0,
    fit_align: FitAlign | None = None,
    corpus: Path | str | None = None,
    corpus_column: str = "text",
    encoder_calls: int = 0,
    probe: Path | str | None = None,
    group_by: str | None = None,
    text_column: str | None = None,
    show_pii: bool = False,
    folder: Path | str | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    command: str | None = None,
) -> AuditReport:
    """Read a sample of a vector store, invert it, and say what that means.

    Args:
        store: An open store, or the address of one (docs/audit.md lists the forms).
        sample: Rows to draw.
        seed: Of everything drawn: two runs with one seed give one report.
        to: The attacker's inverter, or its name.
        encoder: That made the vectors; the inverter's if not given.
        decoding: How the inverter decodes.
        align: A map of the store's vectors into the inverter's space, or the folder of one.
        align_from_store: Make such a map from so many rows with a text, scored on others.
        fit_align: What makes it; as `unembed align` does if not given.
        corpus: A file of texts such as an attacker may have, for the lookup.
        corpus_column: Column of its texts.
        encoder_calls: Let the attacker call the encoder so often for each of 32 records.
        probe: Of words, for texts longer than the inverter writes; the shipped one if not given.
        group_by: A field of the store to break figures down by, such as the tenant.
        text_column: Where the text is, if not under a usual name.
        show_pii: Show what hurts unmasked in the records of the report.
        folder: Keeps recoveries while it runs, so that the same call goes on after a kill.
        progress: Called with (stage, done, total).
        name: Of an open store, for the report; its collection if not given.
        command: That makes the audit again, for the report; from the settings if not given.

    Raises:
        StoreError: The store cannot be read, or its vectors fit no attack.
        ConfigError: A setting that does not exist or does not go with the others.
    """
    numbers = _numbers(sample, seed, align_from_store, encoder_calls)
    sample, seed, pairs, calls = numbers.values()
    require_text(text_column=text_column, corpus_column=corpus_column, group_by=group_by)
    require_text(name=name, command=command)
    require_switch(show_pii=show_pii)
    require_path(corpus=corpus, probe=probe, folder=folder)
    require_callable(progress=progress, fit_align=fit_align)
    decoding = decoding if isinstance(decoding, str) else as_decoding(decoding, {})
    settings = _settings(name or _name(store), numbers, decoding, corpus, align)
    settings |= {"group_by": group_by, "show_pii": bool(show_pii)}
    settings["command"] = command or _command(settings)
    with ExitStack() as stack:
        if isinstance(store, (str, Path)):
            keep = () if group_by is None else (group_by,)
            store = stack.enter_context(open_store(store, text_column=text_column, keep=keep))
        elif text_column is not None:
            raise _text_column_of_an_open_store()
        work_folder = stack.enter_context(unfinished_folder(as_folder(folder)))
        run = _Run(store, as_inverter(to), settings, work_folder, progress)
        run.load_encoders(encoder)
        run.read(sample, seed, group_by)
        if corpus is not None:
            run.read_corpus(Path(corpus), corpus_column)
        parsed = as_decoding(decoding, {})
        run.plan(parsed, seed, calls, probe)
        run.plan_alignment(parsed, seed, align, (pairs, fit_align))
        return run.attack()


def _text_column_of_an_open_store() -> ConfigError:
    fix = "Pass it to open_store"
    return ConfigError("text_column with an address", "an open store", fix)


def _numbers(sample: Any, seed: Any, align_from_store: Any, encoder_calls: Any) -> dict[str, int]:
    least = {
        "sample": (sample, 1),
        "seed": (seed, 0),
        "align_from_store": (align_from_store, 0),
        "encoder_calls": (encoder_calls, 0),
    }
    return dict(zip(least, require_whole(**least), strict=True))


def _settings(
    store: str, numbers: dict[str, int], decoding: Decoding | str, corpus: Any, align: Any
) -> dict[str, Any]:
    """How the audit is made, for the report; raises ConfigError for a map that is none."""
    by_name = isinstance(align, (str, Path))
    is_map = hasattr(align, "describe") and not isinstance(align, type)
    if not (align is None or by_name or is_map):
        fix = "Load it with Alignment.load"
        raise ConfigError("a map, or the folder of one", f"{align!r:.80}", fix)
    return {
        "store": store,
        "sample": numbers["sample"],
        "seed": numbers["seed"],
        "decoding": str(decoding),
        "corpus": str(corpus or ""),
        "align": str(align) if by_name else "",
        "align_from_store": numbers["align_from_store"],
        "encoder_calls": numbers["encoder_calls"],
    }


def _name(store: Store | str | Path) -> str:
    """What the report calls a store: its address, or the collection of an open one."""
    if isinstance(store, Store):
        return store.facts.collection
    if not isinstance(store, (str, Path)):
        raise ConfigError(
            "an open store or the address of one", type(store).__name__, "See docs/audit.md"
        )
    return str(store)


def _command(settings: dict[str, Any]) -> str:
    """The command with these settings, but for those that have no option of their own."""
    words = ["unembed", "audit", settings["store"]]
    for name, value in settings.items():
        if value and name not in ("store", "decoding", "show_pii"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


class _Run:
    """One audit on its way from the store to the report."""

    def __init__(
        self,
        store: Store,
        inverter: Inverter,
        settings: dict[str, Any],
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.store, self.inverter, self.settings = store, inverter, settings
        self.folder = folder
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.notes: list[str] = []
        self.attacks: list[Attack] = []
        self.corpus: Corpus | None = None
        self.home: Encoder | None = None  # of the inverter's space
        self.victim: Encoder | None = None  # of the store's vectors

    def load_encoders(self, encoder: Encoder | str | Path | None) -> None:
        """The encoder of the store, if it is named, and that of the inverter."""
        identity = self.inverter.encoder
        encoder = as_encoder(encoder)
        if encoder is not None and encoder.identity.key == identity.key:
            self.home = self.victim = encoder
            return
        self.victim = encoder
        try:
            self.home = load_encoder(
                identity.name, revision=identity.revision, prompt=identity.prompt
            )
        except (UnembedError, OSError) as error:
            self.notes.append(f"the inverter's encoder could not be loaded: {error}")
        if encoder is None:
            self.victim = self.home

    def read(self, sample: int, seed: int, group_by: str | None) -> None:
        """Draw the sample, find what hurts in it, and say whose vectors they are."""
        rows = min(sample, self.store.facts.count)
        self.progress("reading the store", 0, rows)
        self.batch: VectorBatch = self.store.sample(sample, seed)
        self.progress("reading the store", rows, rows)
        if group_by is not None and group_by not in self.batch.payload:
            fix = "Open it with open_store(…, keep=[group_by])"
            raise ConfigError(f"a store opened with the field {group_by!r}", "one without", fix)
        self.groups = None if group_by is None else self.batch.payload[group_by]
        texts = self.batch.texts
        if texts is not None and not any(text and text.strip() for text in texts):
            field = f"the field {self.store.facts.text!r}"
            self.notes.append(f"{field} was taken for that of the texts, and no row read has one")
        if self.groups is not None and not any(value is not None for value in self.groups):
            raise StoreError(
                f"values of the field {group_by!r}", "none in the rows read", "Correct --group-by"
            )
        finder, finder_name = make_finder()
        self.settings["sensitive_found_by"] = finder_name
        self.records = make_records(
            self.batch.ids,
            self.batch.texts or [],
            self.groups,
            self.inverter.tokenizer,
            finder,
        )
        self._identify()

    def _identify(self) -> None:
        """Say whose vectors they are."""
        batch = self.batch
        self.identity = identify(batch.vectors, batch.texts, self.inverter, self.victim)
        if self.identity.verdict == "different":
            self.notes.append(
                "the vectors are not those of the encoder they were compared with: what the "
                "inverter makes of them means little without --encoder or a map (--align)"
            )

    def read_corpus(self, path: Path, column: str) -> None:
        """Embed an attacker's own texts."""
        if self.victim is None or self.victim.identity.dimension != self.batch.vectors.shape[1]:
            self.notes.append("corpus: not looked up, the store's encoder cannot be run here")
            return
        self.corpus = Corpus.read(path, column, self.victim, self.progress)

    def plan(
        self, decoding: Decoding, seed: int, encoder_calls: int, probe: Path | str | None
    ) -> None:
        """The attacks without a map."""
        decoding.check(has_encoder=decoding.encoder_calls > 0)
        if self.batch.vectors.shape[1] == self.inverter.encoder.dimension:
            self.attacks.append(inversion(self.inverter, decoding, seed, encoder=self.home))
            if encoder_calls:
                self._plan_calls(seed, encoder_calls)
        self._plan_words(probe)
        if self.corpus is not None:
            self.attacks.append(lookup(self.inverter, self.corpus))

    def _plan_words(self, probe: Path | str | None) -> None:
        """The words of texts longer than the inverter writes, where there is a probe for them."""
        longest = self.inverter.length - 1
        own = None if probe is None else WordProbe.from_pretrained(probe)
        rows = [record.row for record in self.records if len(record.token_ids) > longest]
        identity = self.inverter.encoder if self.victim is None else self.victim.identity
        if not rows or self.batch.vectors.shape[1] != identity.dimension:
            return
        probes = map(WordProbe.from_pretrained, shipped_probes()) if own is None else [own]
        for words in probes:
            if words.encoder.key == identity.key:
                self.attacks.append(word_probe(self.inverter, words, rows))
            elif probe is not None:
                raise ConfigError(
                    f"a word probe of {identity.describe()}",
                    words.encoder.describe(),
                    "Correct --probe, or make one with `unembed words --fit`",
                )

    def _plan_calls(self, seed: int, calls: int) -> None:
        if self.home is None:
            raise ConfigError("the encoder, to be called", "none here", "Pass --encoder")
        search = Decoding.parse(f"guided-search:encoder_calls={calls}")
        attack = inversion(
            self.inverter,
            search,
            seed,
            encoder=self.home,
            name="inverter and encoder",
            access=WITH_CALLS.format(n=calls),
        )
        rows = tuple(record.row for record in self.records[:_CALL_ROWS])
        self.attacks.append(
            Attack(attack.name, attack.access, attack.recover, attack.settings, rows)
        )

    def plan_alignment(
        self,
        decoding: Decoding,
        seed: int,
        align: Align | Path | str | None,
        from_store: tuple[int, FitAlign | None],
    ) -> None:
        """The attack through a map: one that is given, or one made from some rows of the store."""
        pairs, fit = from_store
        if isinstance(align, (str, Path)):
            align = Alignment.load(align)
            align.require_target(self.inverter.encoder)
        if align is not None:
            self.attacks.append(
                inversion(
                    self.inverter,
                    decoding,
                    seed,
                    encoder=self.home,
                    align=align,
                    access=WITH_MAP,
                    name="inverter through a map",
                )
            )
        if pairs:
            self.attacks.append(self._alignment(decoding, seed, pairs, fit))
        if not self.attacks:
            raise StoreError(
                f"vectors of {self.inverter.encoder.dimension} dimensions, which the inverter of "
                f"{self.inverter.encoder.name} reads",
                f"{self.batch.vectors.shape[1]} dimensions ({self.identity.candidates})",
                "Pass --checkpoint with an inverter of that encoder, or --align with a map",
            )

    def _alignment(self, decoding: Decoding, seed: int, pairs: int, fit: FitAlign | None) -> Attack:
        fit = fit or fit_pairs(self.inverter.encoder, seed)
        if self.home is None:
            raise ConfigError(
                "the inverter's encoder, to make a map from pairs",
                "none here",
                "Pass --align with a map, or leave --align-from-store out",
            )
        if len(self.records) < _LEAST_PAIRS:
            raise StoreError(
                "rows with a text, to make a map from",
                str(len(self.records)),
                "Name the column of the texts with --text-column",
            )
        places, rest = split_pairs(len(self.records), pairs, seed)
        texts = [self.records[place].text for place in places]
        rows = [self.records[place].row for place in places]
        align: Any = fit(self.batch.vectors[rows], self.home.encode(texts))
        if not callable(align) or not hasattr(align, "describe"):
            expected = "fit_align to give a map, which has describe and can be called"
            raise ConfigError(expected, f"{align!r:.80}", "Return an Alignment")
        attack = inversion(
            self.inverter,
            decoding,
            seed,
            encoder=self.home,
            align=align,
            access=WITH_PAIRS.format(n=len(places)),
            name="inverter through pairs of the store",
        )
        others = tuple(self.records[place].row for place in rest)
        return Attack(attack.name, attack.access, attack.recover, attack.settings, others)

    def attack(self) -> AuditReport:
        """Run the attacks and conclude."""
        recoveries = {
            attack.name: run_attack(
                attack, self.batch.ids, self.batch.vectors, self.folder, self.progress
            )
            for attack in self.attacks
        }
        conclusion = Conclusion(
            self.store,
            self.inverter,
            self.batch,
            self.records,
            self.groups,
            self.corpus,
            self.identity,
            self.attacks,
            self.settings,
            self.notes,
        )
        return conclusion.report(recoveries)
