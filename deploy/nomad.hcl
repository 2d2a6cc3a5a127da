# imds-router on every client of a Nomad cluster: nomad job run deploy/nomad.hcl
# Each client needs the image imds-router: deploy/README.md says how to build it, or to push it to a registry of yours.
# The Docker driver must allow it: plugin "docker" { config { allow_caps = ["all"], allow_privileged = false, volumes { enabled = true } } }
job "imds-router" {
  type     = "system"
  priority = 90

  group "imds-router" {
    # One at a time: what one host loses for a moment, no other does.
    update {
      max_parallel = 1
    }

    task "imds-router" {
      driver = "docker"
      config {
        image        = "imds-router"
        network_mode = "host"
        pid_mode     = "host"
        cgroupns     = "host"
        cap_drop     = ["all"]
        cap_add      = ["net_admin", "sys_admin", "sys_ptrace"]
        security_opt = ["apparmor=unconfined", "label=disable"]
        ulimit {
          core   = "0"
          nofile = "16384"
        }
        volumes = [
          "/var/run/docker.sock:/var/run/docker.sock",
          "/sys/fs/cgroup:/sys/fs/cgroup:ro",
          "/var/lib/imds-router:/var/lib/imds-router",
          "local/config.toml:/etc/imds-router/config.toml:ro",
        ]
      }
      template {
        destination   = "local/config.toml"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = <<-EOT
          region = "eu-west-1"
          [serve]
          metrics = "127.0.0.1:9254"
        EOT
      }
      # The base identity: from Vault, as here, or from the instance profile of the client.
      # template { destination = "secrets/aws.env", env = true, data = "{{ with secret \"aws/creds/imds-router\" }}…{{ end }}" }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
