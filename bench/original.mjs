// The same three measures on @rivet-dev/agentos-core, the system this one sets out from. Run by run.py.
import { AgentOs } from "@rivet-dev/agentos-core";

const rounds = Number(process.argv[2] ?? 5);
const create = [], createEcho = [], warmEcho = [];
for (let i = 0; i < rounds; i++) {
  const began = performance.now();
  const vm = await AgentOs.create();
  const created = performance.now();
  const { stdout } = await vm.exec("echo hi");
  if (stdout.trim() !== "hi") throw new Error(`unexpected output: ${stdout}`);
  create.push(created - began);
  createEcho.push(performance.now() - began);
  for (let k = 0; k < rounds; k++) {
    const start = performance.now();
    await vm.exec("echo hi");
    warmEcho.push(performance.now() - start);
  }
  await vm.dispose();
}
console.log(JSON.stringify({ create, createEcho, warmEcho }));
process.exit(0);
