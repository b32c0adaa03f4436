// What a web page does with a VM by the given client, bundled for the browser. Answers what it saw.
import { createClient } from "@rivet-dev/agentos/client";

const decoder = new TextDecoder();

globalThis.overSocket = async (options, key) => {
  const connection = createClient({ ...options, devtools: false }).vm.getOrCreate(key).connect();
  const output = { stdout: "", stderr: "" };
  let screen = "";
  connection.on("processOutput", ({ stream, data }) => { output[stream] += decoder.decode(data); });
  connection.on("shellData", ({ data }) => { screen += decoder.decode(data); });
  const processEnded = new Promise((resolve) => connection.on("processExit", resolve));
  const shellEnded = new Promise((resolve) => connection.on("shellExit", resolve));
  const { stdout, exitCode } = await connection.exec("cat; exit 3", { stdin: "given\n" });
  const { pid } = await connection.spawn("sh", ["-c", "read line; echo out $line; echo err >&2; exit 4"]);
  await connection.writeProcessStdin(pid, new TextEncoder().encode("bytes\n"));
  const exit = await processEnded;
  const { shellId } = await connection.openShell({ cols: 90, rows: 30 });
  await connection.writeShell(shellId, "echo size=$(stty size | tr ' ' x); exit 5\n");
  const shellExit = await shellEnded;
  await connection.writeFile("/tmp/bytes", new Uint8Array([1, 0, 255]));
  const file = [...await connection.readFile("/tmp/bytes")];
  await connection.dispose();
  return {
    exec: [stdout, exitCode], output, exit: [exit.pid === pid, exit.exitCode], file,
    shell: [screen.includes("size=30x90"), shellExit.exitCode],
  };
};

globalThis.overHttp = async (options, key) => {
  const agent = createClient({ ...options, devtools: false }).vm.getOrCreate(key);
  await agent.writeFile("/tmp/bytes", new Uint8Array([1, 0, 255]));
  return [(await agent.exec("echo hello")).stdout, [...await agent.readFile("/tmp/bytes")]];
};
