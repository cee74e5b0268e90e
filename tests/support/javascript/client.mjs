// Every method of RunPod's own JavaScript library, against the endpoint that it is given.
//
//     node client.mjs BASE_URL KEY ENDPOINT_ID
//
// Prints what it saw, as one JSON object on the last line: the library itself prints, too.
import runpodSdk from "runpod-sdk";

const [baseUrl, key, endpointId] = process.argv.slice(2);
const endpoint = runpodSdk(key, { baseUrl }).endpoint(endpointId);
const seen = {};

seen.health = await endpoint.health();
// over the second that the shortest wait is: so it goes on by /status-sync
seen.runSync = await endpoint.runSync({ input: { parts: 3, sleep: 0.7 } }, 30000);
seen.tooLong = await endpoint.runSync({ input: { parts: 1, sleep: 4 } }, 1000);

const running = await endpoint.run({ input: { parts: 3, sleep: 0.3 } });
seen.run = running;
seen.status = await endpoint.status(running.id);
seen.streamed = [];
for await (const part of endpoint.stream(running.id)) {
  seen.streamed.push(part.output.part);
}
seen.statusSync = await endpoint.statusSync(running.id);

const large = await endpoint.run({ input: { parts: 5, size: 600000 } });
seen.large = [];
await endpoint.statusSync(large.id);
for await (const part of endpoint.stream(large.id)) {
  seen.large.push(part.output.part);
}

const long = await endpoint.run({ input: { parts: 100, sleep: 0.3 } });
seen.cancel = await endpoint.cancel(long.id);
seen.cancelled = await endpoint.statusSync(long.id);
seen.purgeQueue = await endpoint.purgeQueue();
console.log(JSON.stringify(seen));
