// A terminal in the VM: what it shows comes as events.
import { createClient } from "rivetkit/client";

const client = createClient({ endpoint: process.env.AGENTOS_ENDPOINT ?? "http://localhost:6420" });

const agent = client.vm.getOrCreate("typescript-shell");
const connection = agent.connect();
const decoder = new TextDecoder();

connection.on("shellData", ({ data }: { data: Uint8Array }) => {
  process.stdout.write(decoder.decode(data, { stream: true }));
});
const ended = new Promise<void>((resolve) => {
  connection.on("shellExit", ({ shellId, exitCode }: { shellId: string; exitCode: number }) => {
    console.log(`${shellId} ended with code ${exitCode}`);
    resolve();
  });
});

const { shellId } = await agent.openShell({ cols: 100, rows: 30 });
await agent.writeShell(shellId, "ls -a /home/agentos\n");
await agent.resizeShell(shellId, 120, 40);
await agent.writeShell(shellId, "stty size\n");
await agent.closeShell(shellId);
await ended;

await connection.dispose();
await client.dispose();
