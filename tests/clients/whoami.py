"""Who am I? Asks STS with whatever boto3's default credential chain finds, as any application would."""

import boto3

print(boto3.client("sts").get_caller_identity()["Arn"])
