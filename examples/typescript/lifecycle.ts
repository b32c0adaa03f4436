// List, inspect, stop and kill the processes of a VM, and see its whole tree. With the nested names of the verbs.
import { createClient } from "rivetkit/client";

const client = createClient({ endpoint: process.env.AGENTOS_ENDPOINT ?? "http://localhost:6420" });

const agent = client.vm.getOrCreate("typescript-lifecycle");

const polite = await agent.process.spawn("sleep", ["1000"]);
const stubborn = await agent.process.spawn("bash", ["-c", "trap '' TERM; sh -c 'echo ready; read line'; sleep 1000"]);
await agent.process.readOutput(stubborn.pid, { wait: 10_000 });

for (const { pid, command, running } of await agent.process.list()) {
  console.log(pid, command, running ? "running" : "exited");
}
for (const node of await agent.process.tree()) {
  console.log(node.driver, node.command, node.children.map((child: { command: string }) => child.command));
}

await agent.process.stop(polite.pid);
console.log("stopped:", await agent.process.wait(polite.pid));
await agent.process.kill(stubborn.pid);
const { exitCode, signal } = await agent.process.get(stubborn.pid);
console.log("killed:", exitCode, signal);

await agent.destroy();
await client.dispose();
