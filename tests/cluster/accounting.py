"""What sacct needs: slurmdbd and the database below it, both on the first host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.polling import wait_until

if TYPE_CHECKING:
    from tests.cluster.slurm import Slurm

_SLURM_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={first}
"""

# The library takes `localhost` for its default socket below /run, which is the host's own.
_SLURMDBD_CONF = """
AuthType=auth/munge
DbdHost={first}
SlurmUser=root
PidFile={root}/slurm/slurmdbd.pid
LogFile={root}/slurm/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
_SOCKET = Path("/run/mysqld/mysqld.sock")


def start(slurm: Slurm) -> None:
    """Start both, and make the cluster known to them.

    The database is there before slurmdbd, which would make it itself: after the refused connection by which it finds it
    missing, MariaDB's library 11.8.9 (Debian 13) takes no result of any query of that process ("maximum allowed number
    of columns (=0)", error 5027), and slurmdbd ends.
    """
    host, data = slurm.login, slurm.root / "database"
    host.run(["mkdir", str(_SOCKET.parent)])
    options = ["--no-defaults", f"--datadir={data}", "--user=root"]
    install = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
    host.run(["mariadb-install-db", *options, *install])
    first = slurm.root / "slurm/database.sql"
    first.write_text("CREATE DATABASE slurm;\n")
    small = ["--skip-networking", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
    database = ["mariadbd", *options, *small, f"--init-file={first}", f"--socket={_SOCKET}"]
    slurm.start_daemon(host, "mariadbd", database)
    wait_until(host.path(_SOCKET).exists, seconds=30, what=lambda: f"the database's socket\n{slurm.logs()}")
    conf = slurm.root / "slurm/slurmdbd.conf"
    conf.write_text(_SLURMDBD_CONF.format(root=slurm.root, first=host.root.name))
    # It would hold a password.
    conf.chmod(0o600)
    slurm.start_daemon(host, "slurmdbd", ["slurmdbd", "-D"])
    with (slurm.root / "slurm/slurm.conf").open("a") as file:
        file.write(_SLURM_CONF.format(first=host.root.name))
    add = ["sacctmgr", "--immediate", "add", "cluster", "hpcctr"]
    said: list[bytes] = []

    def added() -> bool:
        done = slurm.run(add, check=False)
        said[:] = [done.stdout, done.stderr]
        return done.returncode == 0

    wait_until(added, seconds=60, what=lambda: f"the accounting daemon; {said}\n{slurm.logs()}")
