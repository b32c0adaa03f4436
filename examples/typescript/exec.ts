// Run a command and look at its result. A program that node (22.18 or newer) runs as it is: `node exec.ts`.
import { createClient } from "rivetkit/client";

const client = createClient({ endpoint: process.env.AGENTOS_ENDPOINT ?? "http://localhost:6420" });

const agent = client.vm.getOrCreate("typescript-exec");

const { stdout, stderr, exitCode } = await agent.exec("echo hello && ls /home/agentos");
console.log({ stdout, stderr, exitCode });

const late = await agent.exec("echo begun; sleep 60", { timeout: 200 });
console.log(late.reason, JSON.stringify(late.stdout));

await client.dispose();
