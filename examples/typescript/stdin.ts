// Write to a process's stdin, close it, and wait for its end.
import { createClient } from "rivetkit/client";

const client = createClient({ endpoint: process.env.AGENTOS_ENDPOINT ?? "http://localhost:6420" });

const agent = client.vm.getOrCreate("typescript-stdin");

const { pid } = await agent.spawn("sort", []);
await agent.writeProcessStdin(pid, "pear\napple\n");
await agent.writeProcessStdin(pid, new TextEncoder().encode("fig\n"));
await agent.closeProcessStdin(pid);
console.log("exit code:", await agent.waitProcess(pid));

const { events } = await agent.readProcessOutput(pid, { cursor: 0 });
for (const { data } of events) process.stdout.write(data);

await client.dispose();
