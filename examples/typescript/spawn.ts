// Start a server in the VM, hear what it writes, ask it something, and stop it.
import { createClient } from "rivetkit/client";

const client = createClient({ endpoint: process.env.AGENTOS_ENDPOINT ?? "http://localhost:6420" });

const agent = client.vm.getOrCreate("typescript-spawn");
const decoder = new TextDecoder();
const connection = agent.connect();

const ready = new Promise<void>((resolve) => {
  connection.on("processOutput", ({ pid, stream, data }: { pid: number; stream: string; data: Uint8Array }) => {
    console.log(`[pid ${pid}] ${stream}: ${decoder.decode(data).trimEnd()}`);
    resolve();
  });
});
const ended = new Promise<void>((resolve) => {
  connection.on("processExit", ({ pid, exitCode }: { pid: number; exitCode: number }) => {
    console.log(`[pid ${pid}] exited with code ${exitCode}`);
    resolve();
  });
});

const { pid } = await agent.spawn("node", ["/home/agentos/server.js"]);
await ready;
const answer = await agent.vmFetch(3000, "/");
console.log(answer.status, decoder.decode(answer.body).trimEnd());
await agent.stopProcess(pid);
await ended;

await connection.dispose();
await client.dispose();
