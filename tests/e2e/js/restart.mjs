// A client of a server that restarts: its connection comes back by itself, and no call fails.
// Usage: node restart.mjs ENDPOINT json|cbor|bare. A line on stdin says that the server has begun to end.
import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { createClient } from "@rivet-dev/agentos/client";

const [endpoint, encoding] = process.argv.slice(2);
const client = createClient({ endpoint, encoding });
const agent = client.vm.getOrCreate("restarted");
const connection = agent.connect();
const decoder = new TextDecoder();
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
let seen = "";
connection.on("processOutput", (data) => {
  seen += decoder.decode(data.data);
});

const echoed = async (word) => {
  // An event can come only to a connection that is there again. While it is told to wait, the client tries after 250 ms,
  // 500 ms and so on; once the first server has ended, its try waits in the socket until the second one is there.
  const deadline = Date.now() + 30_000;
  while (!seen.includes(word)) {
    assert.ok(Date.now() < deadline, `no event with ${word}`);
    await agent.spawn("echo", [word]);
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
};

await agent.exec("echo kept > file");
await echoed("before");
console.log("ready");
for await (const line of lines) {
  if (line === "ending") break;
}
let calls = 0;
const until = Date.now() + 3000;
while (Date.now() < until) {
  assert.equal((await agent.exec("cat file")).stdout, "kept\n");
  calls += 1;
}
await echoed("after");
console.log(`ok ${calls}`);
process.exit(0);
