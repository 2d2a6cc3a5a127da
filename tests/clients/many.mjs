// Many clients of the JavaScript SDK at once. Argument: how many. Prints how many have credentials, as JSON.
import { fromInstanceMetadata } from "@aws-sdk/credential-providers";

const providers = Array.from({ length: Number(process.argv[2]) }, () => fromInstanceMetadata());
const results = await Promise.allSettled(providers.map((provider) => provider()));
const failures = results.filter((it) => it.status === "rejected").map((it) => `${it.reason.code ?? ""} ${it.reason}`);
console.log(JSON.stringify({ credentials: results.length - failures.length, failures }));
