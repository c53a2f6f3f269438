"""The store as other OCI tools see it: skopeo reads it where it lies, and copies it to another
layout, to an archive, and through a registry and back, to the byte."""

import hashlib
import json
import os
import shutil
import subprocess
import unittest

from support import MiB, THINPLY, Case, Server, die_with_parent, need, pattern, run, wait_for

REGISTRY = """\
version: 0.1
log: {{accesslog: {{disabled: true}}, level: error}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:0"}}
"""


def setUpModule():
    need("skopeo", "docker-registry", "ss", bindings=True)


class Registry:
    """`docker-registry` on a free port of loopback for the time of a `with` block."""

    def __init__(self, folder):
        self.folder = folder / "registry"
        configuration = folder / "registry.yml"
        configuration.write_text(REGISTRY.format(folder=self.folder))
        self.process = subprocess.Popen(
            ["docker-registry", "serve", configuration], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)

    def port(self):
        for line in run("ss", "-Hltnp").splitlines():
            if f"pid={self.process.pid}," in line:
                return line.split()[3].rpartition(":")[2]
        return None

    def __enter__(self):
        self.address = f"127.0.0.1:{wait_for(self.port, 'the registry listens')}"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def blobs(self):
        """The SHA-256 of everything that was pushed."""
        return {data.parent.name for data in self.folder.rglob("blobs/sha256/*/*/data")}


class Skopeo(Case):
    def setUp(self):
        super().setUp()
        self.root = self.path("store")
        self.base = pattern(4 * MiB, seed=1)
        self.app = self.base[:MiB] + pattern(MiB, seed=2) + self.base[2 * MiB:]
        for name, content in [("base", self.base), ("app", self.app)]:
            self.path(f"{name}.raw").write_bytes(content)
        self.store("image", "import", self.path("base.raw"), "team/base:1")
        self.store("image", "import", "--parent", "team/base:1", self.path("app.raw"), "team/app:1")
        self.before = self.blobs(self.root)

    def store(self, *words, root=None):
        return run(THINPLY, *words, env={**os.environ, "THINPLY_ROOT": str(root or self.root)})

    def facts(self, name, root=None):
        return json.loads(self.store("image", "inspect", name, root=root))[0]

    def blobs(self, layout):
        """Names and bytes of all blobs of a layout."""
        return {path.name: path.read_bytes() for path in (layout / "blobs/sha256").iterdir()}

    def assert_same_store(self, root):
        """A store with the same images to the byte, whose devices read as they should."""
        self.assertEqual(self.blobs(root).keys(), self.before.keys())
        self.assertTrue(self.blobs(root) == self.before, "the bytes of a blob changed")
        self.assertEqual(self.store("store", "check", root=root), "clean\n")
        for name, content in [("team/base:1", self.base), ("team/app:1", self.app)]:
            self.assertEqual(self.facts(name, root)["id"], self.facts(name)["id"])
            with Server("--all", "--root", root) as server:
                uri = f"nbd+unix:///image/{name}?socket={server.socket}"
                handle = server.connect(uri=uri)
                self.assert_disk(handle, content, name)
                handle.shutdown()

    def test_inspect_shows_what_the_store_has(self):
        for name in ["team/base:1", "team/app:1"]:
            shown = json.loads(run("skopeo", "inspect", f"oci:{self.root}:{name}"))
            facts = self.facts(name)
            self.assertEqual(shown["Digest"], f"sha256:{facts['id']}")
            digests = [layer["digest"] for layer in facts["manifest"]["layers"]]
            self.assertEqual(shown["Layers"], digests)
            self.assertEqual(shown["Created"], facts["created"])
            config = json.loads(run("skopeo", "inspect", "--config", f"oci:{self.root}:{name}"))
            self.assertEqual(config["rootfs"]["diff_ids"], digests)
            raw = run("skopeo", "inspect", "--raw", f"oci:{self.root}:{name}")
            self.assertEqual(raw.encode(), self.before[facts["id"]])

    def test_a_copy_to_another_layout_and_back_is_the_same(self):
        for name in ["team/base:1", "team/app:1"]:
            run("skopeo", "copy", f"oci:{self.root}:{name}", f"oci:{self.path('layout')}:{name}")
        self.assertTrue(self.blobs(self.path("layout")) == self.before)
        self.store("image", "load", self.path("layout"), root=self.path("second"))
        self.assert_same_store(self.path("second"))

    def test_a_push_to_a_registry_and_a_pull_give_the_same(self):
        with Registry(self.folder) as registry:
            for name in ["team/base:1", "team/app:1"]:
                remote = f"docker://{registry.address}/{name}"
                run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{self.root}:{name}", remote)
                shown = json.loads(run("skopeo", "inspect", "--tls-verify=false", remote))
                self.assertEqual(shown["Digest"], f"sha256:{self.facts(name)['id']}")
            # Layers that both images share are there once.
            self.assertEqual(registry.blobs(), set(self.before))
            for name in ["team/base:1", "team/app:1"]:
                run("skopeo", "copy", "--src-tls-verify=false",
                    f"docker://{registry.address}/{name}", f"oci:{self.path('pulled')}:{name}")
        self.store("image", "load", self.path("pulled"), root=self.path("second"))
        self.assert_same_store(self.path("second"))

    def test_archives_go_both_ways(self):
        self.store("image", "save", "-o", self.path("saved.tar"), "team/base:1", "team/app:1")
        archive = f"oci-archive:{self.path('saved.tar')}:team/app:1"
        shown = json.loads(run("skopeo", "inspect", archive))
        self.assertEqual(shown["Digest"], f"sha256:{self.facts('team/app:1')['id']}")
        second = self.path("second")
        for name in ["team/base:1", "team/app:1"]:
            made = self.path(f"{name[5:-2]}.tar")
            run("skopeo", "copy", f"oci:{self.root}:{name}", f"oci-archive:{made}:{name}")
            self.store("image", "load", made, root=second)
        self.assert_same_store(second)

    def test_an_image_of_another_kind_is_refused_with_its_reason(self):
        """A layout of tar layers, as Docker's are: thinply says what it is and keeps nothing."""
        layout = self.path("layout")
        shutil.copytree(self.root / "blobs", layout / "blobs")
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        index = json.loads((self.root / "index.json").read_text())
        entry = index["manifests"][0]
        old = entry["digest"].removeprefix("sha256:")
        manifest = (layout / "blobs/sha256" / old).read_text()
        manifest = manifest.replace("vnd.thinply.layer.packed.v1", "vnd.oci.image.layer.v1.tar")
        new = hashlib.sha256(manifest.encode()).hexdigest()
        (layout / "blobs/sha256" / new).write_text(manifest)
        entry["digest"], entry["size"] = f"sha256:{new}", len(manifest)
        index["manifests"] = [entry]
        (layout / "index.json").write_text(json.dumps(index))
        second = self.path("second")
        environment = {**os.environ, "THINPLY_ROOT": str(second)}
        done = subprocess.run([THINPLY, "image", "load", layout], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 2, done)
        self.assertIn("application/vnd.oci.image.layer.v1.tar", done.stderr)
        self.assertEqual(self.store("image", "ls", "--json", root=second).strip(), "[]")


if __name__ == "__main__":
    unittest.main()
