// Who am I? Asks STS with whatever the SDK's default credential chain finds, as any application would.
import { GetCallerIdentityCommand, STSClient } from "@aws-sdk/client-sts";
import { fromNodeProviderChain } from "@aws-sdk/credential-providers";

const sts = new STSClient({ credentials: fromNodeProviderChain() });
console.log((await sts.send(new GetCallerIdentityCommand({}))).Arn);
