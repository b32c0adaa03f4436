// Every scene that a TypeScript program plays with a VM, with assertions. Prints one line for each that passed.
// Usage: node scenes.mjs ENDPOINT json|cbor|bare
import assert from "node:assert/strict";
import { createClient } from "@rivet-dev/agentos/client";

const [endpoint, encoding] = process.argv.slice(2);
const client = createClient({ endpoint, encoding });
const decoder = new TextDecoder();
const run = `${encoding}-${process.versions.node}-${process.pid}`;
let count = 0;
const fresh = () => client.vm.getOrCreate(`${run}-${count++}`);

const until = async (what, condition) => {
  const deadline = Date.now() + 20_000;
  while (!condition()) {
    assert.ok(Date.now() < deadline, `timed out: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
};

const failure = async (promise) => {
  const began = Date.now();
  try {
    await promise;
  } catch (error) {
    assert.ok(Date.now() - began < 1500, `${error.group}.${error.code} was retried`);
    return error;
  }
  assert.fail("it did not fail");
};

const scenes = {
  async execAndItsResult() {
    const result = await fresh().exec("echo hello && echo oops >&2; exit 3");
    assert.equal(result.stdout, "hello\n");
    assert.equal(result.stderr, "oops\n");
    assert.equal(result.exitCode, 3);
    assert.equal(result.reason, "exited");
  },

  async execOptions() {
    const agent = fresh();
    const result = await agent.exec("cat; pwd; echo $COLOR", {
      cwd: "/tmp", env: { COLOR: "blue" }, stdin: "in\n", timeout: 20_000,
    });
    assert.equal(result.stdout, "in\n/tmp\nblue\n");
    const late = await agent.exec("echo begun; sleep 60", { timeout: 200 });
    assert.equal(late.reason, "timeout");
    assert.equal(late.stdout, "begun\n");
    const raw = await agent.exec("printf '\\377\\000x'", { encoding: "bytes" });
    assert.deepEqual([...raw.stdout], [255, 0, 120]);
  },

  async backgroundProcessWithEvents() {
    const agent = fresh();
    const connection = agent.connect();
    const output = { stdout: "", stderr: "" };
    const order = [];
    let exit;
    connection.on("processOutput", (data) => {
      output[data.stream] += decoder.decode(data.data);
      order.push(data.pid);
    });
    connection.on("processExit", (data) => { exit = data; order.push("exit"); });
    const { pid } = await agent.spawn("node", ["-e", "console.log('up'); console.error('warn'); process.exit(4)"]);
    await until("processExit", () => exit);
    assert.equal(exit.pid, pid);
    assert.equal(exit.exitCode, 4);
    assert.equal(output.stdout, "up\n");
    assert.equal(output.stderr, "warn\n");
    assert.equal(order.at(-1), "exit");
    assert.ok(order.slice(0, -1).every((one) => one === pid));
    await connection.dispose();
  },

  async shortestProcessesLoseNothing() {
    const agent = fresh();
    const connection = agent.connect();
    const seen = new Map();
    const exits = new Map();
    connection.on("processOutput", ({ pid, data }) => seen.set(pid, (seen.get(pid) ?? "") + decoder.decode(data)));
    connection.on("processExit", ({ pid, exitCode }) => exits.set(pid, exitCode));
    const started = await Promise.all(Array.from({ length: 20 }, (_, i) => agent.spawn("echo", [`line ${i}`])));
    await until("all exits", () => exits.size === 20);
    started.forEach(({ pid }, i) => assert.equal(seen.get(pid), `line ${i}\n`));
    await connection.dispose();
  },

  async standardInput() {
    const agent = fresh();
    const { pid } = await agent.spawn("sh", ["-c", "read line; test \"$line\" = 'hello from stdin'"]);
    await agent.writeProcessStdin(pid, "hello from stdin\n");
    await agent.closeProcessStdin(pid);
    assert.equal(await agent.waitProcess(pid), 0);
    const cat = await agent.spawn("cat", []);
    await agent.writeProcessStdin(cat.pid, new Uint8Array([1, 255]));
    await agent.closeProcessStdin(cat.pid);
    assert.equal(await agent.waitProcess(cat.pid), 0);
    const page = await agent.readProcessOutput(cat.pid, { cursor: 0 });
    assert.deepEqual([...page.events[0].data], [1, 255]);
    assert.equal(page.exited, true);
  },

  async lifecycle() {
    const agent = fresh();
    const { pid } = await agent.spawn("sleep", ["1000"]);
    const stubborn = await agent.spawn("sh", ["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]);
    const listed = await agent.listProcesses();
    assert.deepEqual(listed.map((one) => [one.pid, one.command, one.running]), [
      [pid, "sleep", true], [stubborn.pid, "sh", true],
    ]);
    assert.deepEqual(listed[0].args, ["1000"]);
    const info = await agent.getProcess(pid);
    assert.equal(info.running, true);
    assert.equal(info.exitCode, null);
    await agent.stopProcess(pid);
    assert.equal(await agent.waitProcess(pid), 143);
    assert.equal((await agent.getProcess(pid)).running, false);
    await agent.readProcessOutput(stubborn.pid, { wait: 10_000 });
    await agent.stopProcess(stubborn.pid);
    await agent.killProcess(stubborn.pid);
    assert.equal(await agent.waitProcess(stubborn.pid), 137);
    await agent.stopProcess(pid);
    const tree = await agent.processTree();
    assert.ok(Array.isArray(tree));
  },

  async shellOnATerminal() {
    const agent = fresh();
    const connection = agent.connect();
    let screen = "";
    let exit;
    connection.on("shellData", (data) => { screen += decoder.decode(data.data); });
    connection.on("shellExit", (data) => { exit = data; });
    const { shellId } = await agent.openShell();
    await agent.writeShell(shellId, "echo sum=$((40+2))\n");
    await until("the sum", () => screen.includes("sum=42"));
    await agent.resizeShell(shellId, 120, 40);
    await agent.writeShell(shellId, "echo size=$(stty size | tr ' ' x)\n");
    await until("the new size", () => screen.includes("size=40x120"));
    await agent.closeShell(shellId);
    await until("shellExit", () => exit);
    assert.equal(exit.shellId, shellId);
    await connection.dispose();
  },

  async nestedNames() {
    const { process: processes, terminal } = fresh();
    assert.equal((await processes.exec("echo nested")).stdout, "nested\n");
    assert.equal((await processes.execFile("printf", ["%s", "$HOME"])).stdout, "$HOME");
    const { pid } = await processes.spawn("cat", []);
    await processes.writeStdin(pid, "x");
    await processes.closeStdin(pid);
    assert.equal(await processes.wait(pid), 0);
    assert.equal(decoder.decode((await processes.readOutput(pid)).events[0].data), "x");
    assert.equal((await processes.list()).length, 1);
    assert.equal((await processes.get(pid)).exitCode, 0);
    for (const [verb, code] of [["stop", 143], ["kill", 137], ["signal", 130]]) {
      const sleep = await processes.spawn("sleep", ["1000"]);
      assert.deepEqual((await processes.all()).map((one) => one.pid), [sleep.pid]);
      assert.deepEqual((await processes.tree()).map((one) => one.pid), [sleep.pid]);
      await processes[verb](sleep.pid, ...(verb === "signal" ? ["SIGINT"] : []));
      assert.equal(await processes.wait(sleep.pid), code);
    }
    const { shellId } = await terminal.open({ cols: 100, rows: 30 });
    assert.equal((await terminal.list())[0].cols, 100);
    await terminal.resize(shellId, 120, 40);
    await terminal.write(shellId, "stty size; exit 5\n");
    assert.equal(await terminal.wait(shellId), 5);
    const shown = (await terminal.read(shellId)).events.map((one) => decoder.decode(one.data)).join("");
    assert.match(shown, /40 120/);
    await terminal.close(shellId);
  },

  async commandsOfAShellThatIsClosedAtOnce() {
    const agent = fresh();
    const connection = agent.connect();
    let screen = "";
    connection.on("shellData", (data) => { screen += decoder.decode(data.data); });
    const { shellId } = await agent.openShell();
    await agent.writeShell(shellId, "ls -la /home/agentos\n");
    await agent.resizeShell(shellId, 120, 40);
    await agent.closeShell(shellId);
    await until("the listing", () => screen.includes(".bashrc"));
    await connection.dispose();
  },

  async actionsOverAConnection() {
    const connection = fresh().connect();
    const results = await Promise.all(Array.from({ length: 50 }, (_, i) => connection.exec(`echo ${i}`)));
    results.forEach((result, i) => assert.equal(result.stdout, `${i}\n`));
    const error = await failure(connection.waitProcess(9999));
    assert.equal(`${error.group}.${error.code}`, "process.not_found");
    assert.equal((await connection.exec("echo still here")).stdout, "still here\n");
    await connection.dispose();
  },

  async files() {
    const agent = fresh();
    await agent.writeFile("notes/$HOME", new Uint8Array([0, 128, 255]));
    await agent.writeFile("notes/b", "text");
    assert.deepEqual([...(await agent.readFile("notes/$HOME"))], [0, 128, 255]);
    assert.deepEqual(await agent.readdir("notes"), ["$HOME", "b"]);
    assert.equal((await agent.stat("notes/b")).size, 4);
    assert.equal(await agent.exists("notes/none"), false);
    await agent.move("notes/b", "notes/c");
    await agent.deleteFile("notes/c");
    const error = await failure(agent.readFile("notes/c"));
    assert.equal(`${error.group}.${error.code}`, "file.not_found");
  },

  async requestsIntoTheVm() {
    const agent = fresh();
    const { pid } = await agent.spawn("node", ["-e",
      "require('http').createServer((q, r) => { r.setHeader('x-path', q.url); q.pipe(r); })" +
      ".listen(3000, '127.0.0.1', () => console.log('listening'))"]);
    await agent.readProcessOutput(pid, { wait: 15_000 });
    const answer = await agent.vmFetch(3000, "/a?b=c", { method: "POST", body: "ping" });
    assert.equal(answer.status, 200);
    assert.equal(answer.headers["x-path"], "/a?b=c");
    assert.equal(decoder.decode(answer.body), "ping");
    const link = await agent.createPreview(3000, { expiresIn: 60_000, path: "/page?d=e" });
    const page = await fetch(link.url, { method: "POST", body: "through the link" });
    assert.equal(page.headers.get("x-path"), "/page?d=e");
    assert.equal(await page.text(), "through the link");
    assert.ok(link.expiresAt > Date.now());
    await agent.killProcess(pid);
    assert.equal((await fetch(link.url)).status, 502);
  },

  async sameKeySameVm() {
    const key = `${run}-shared`;
    const all = await Promise.all(
      Array.from({ length: 30 }, () => client.vm.getOrCreate(key).exec("echo x >> /tmp/marks; wc -l < /tmp/marks")));
    assert.deepEqual(all.map((one) => Number(one.stdout)).sort((a, b) => a - b).at(-1), 30);
    const id = await client.vm.getOrCreate(key).resolve();
    assert.equal(await client.vm.get(key).resolve(), id);
    assert.match((await client.vm.getForId(id).exec("wc -l < /tmp/marks")).stdout, /30/);
    const other = await client.vm.create([`${run}-created`, "a/b"], { input: { size: 1 } });
    assert.equal((await other.exec("echo made")).stdout, "made\n");
  },

  async refusalsAreFinalAndClear() {
    const agent = fresh();
    const expect = async (promise, code) => {
      const error = await failure(promise);
      assert.equal(`${error.group}.${error.code}`, code);
      return error;
    };
    assert.match((await expect(agent.getProcess(4711), "process.not_found")).message, /Process not found: 4711/);
    await expect(agent.noSuchThing(), "actor.action_not_found");
    assert.match((await expect(agent.exec(1), "request.invalid")).message, /command: wanted text/);
    await expect(agent.exec("true", { timeOut: 1 }), "request.invalid");
    await expect(agent.spawn("no-such-program", []), "process.spawn_failed");
    await expect(agent.writeShell("nope", "x"), "shell.not_found");
    await expect(client.vm.get(`${run}-never`).exec("true"), "vm.not_found");
    assert.equal((await agent.exec("no-such-program")).exitCode, 127);
  },

  async destroyIsQuickAndFinal() {
    const agent = fresh();
    await agent.exec("echo kept > kept");
    const id = await agent.resolve();
    const began = Date.now();
    await client.vm.getForId(id).destroy();
    assert.ok(Date.now() - began < 1000);
    assert.equal((await agent.exec("cat kept")).exitCode, 1);
  },
};

for (const [name, scene] of Object.entries(scenes)) {
  await scene();
  console.log("ok", name);
}
await client.dispose();
process.exit(0);
