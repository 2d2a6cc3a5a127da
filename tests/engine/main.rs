//! The trials on a real engine, as root: `tests/run`, or `cargo test --test engine [-- FILTER]`. A plain `cargo test` leaves
//! them out. How to write one is told in `rig.rs`; a new topic is a `mod` and a line in [`trials`].

#[cfg(target_os = "linux")]
mod attacks;
#[cfg(target_os = "linux")]
mod bases;
#[cfg(target_os = "linux")]
mod cases;
#[cfg(target_os = "linux")]
mod churn;
#[cfg(target_os = "linux")]
mod cloud;
#[cfg(target_os = "linux")]
#[path = "../conformance/mod.rs"]
mod conformance;
#[cfg(target_os = "linux")]
mod connections;
#[cfg(target_os = "linux")]
mod crash;
#[cfg(target_os = "linux")]
mod credentials;
#[cfg(target_os = "linux")]
mod deploy;
#[cfg(target_os = "linux")]
mod descriptors;
#[cfg(target_os = "linux")]
mod docker_failures;
#[cfg(target_os = "linux")]
mod filters;
#[cfg(target_os = "linux")]
mod floods;
#[cfg(target_os = "linux")]
mod half_closed;
#[cfg(target_os = "linux")]
mod host;
#[cfg(target_os = "linux")]
mod identities;
#[cfg(target_os = "linux")]
mod image;
#[cfg(target_os = "linux")]
mod image_labels;
#[cfg(target_os = "linux")]
mod instances;
#[cfg(target_os = "linux")]
mod interfaces;
#[cfg(target_os = "linux")]
mod links;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod networks;
#[cfg(target_os = "linux")]
mod passive;
#[cfg(target_os = "linux")]
mod podman;
#[cfg(target_os = "linux")]
mod power_loss;
#[cfg(target_os = "linux")]
mod refusals;
#[cfg(target_os = "linux")]
mod repair;
#[cfg(target_os = "linux")]
mod rig;
#[cfg(target_os = "linux")]
mod rig_itself;
#[cfg(target_os = "linux")]
mod secrecy;
#[cfg(target_os = "linux")]
mod upheaval;

#[cfg(target_os = "linux")]
fn trials(rig: &rig::Rig) -> Vec<libtest_mimic::Trial> {
    let mut trials = Vec::new();
    trials.extend(rig_itself::trials(rig));
    trials.extend(host::trials());
    trials.extend(links::trials());
    trials.extend(identities::trials(rig));
    trials.extend(refusals::trials(rig));
    trials.extend(credentials::trials(rig));
    trials.extend(image_labels::trials(rig));
    trials.extend(bases::trials(rig));
    trials.extend(upheaval::trials(rig));
    trials.extend(cases::trials(rig));
    trials.extend(networks::trials(rig));
    trials.extend(podman::trials(rig));
    trials.extend(load::trials(rig));
    trials.extend(floods::trials(rig));
    trials.extend(connections::trials(rig));
    trials.extend(half_closed::trials(rig));
    trials.extend(repair::trials(rig));
    trials.extend(filters::trials(rig));
    trials.extend(crash::trials(rig));
    trials.extend(power_loss::trials(rig));
    trials.extend(descriptors::trials(rig));
    trials.extend(docker_failures::trials(rig));
    trials.extend(interfaces::trials(rig));
    trials.extend(instances::trials(rig));
    trials.extend(attacks::trials(rig));
    trials.extend(passive::trials(rig));
    trials.extend(churn::trials(rig));
    trials.extend(deploy::trials(rig));
    trials.extend(cloud::trials(rig));
    trials.extend(image::trials(rig));
    // Looks at what all the others have left in their logs.
    trials.extend(secrecy::trials(rig));
    trials
}

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use std::process::ExitCode;

    if let Some(proxy) = docker_failures::Proxy::of_arguments() {
        return proxy.serve();
    }
    let mut arguments = libtest_mimic::Arguments::from_args();
    // They share engines, and time is what many of them look at.
    arguments.test_threads = Some(1);
    let rig = rig::Rig::new();
    let trials = trials(&rig);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if let Err(why) = rig.prepare() {
        eprintln!("{why}");
        return ExitCode::FAILURE;
    }
    let views: Vec<_> = rig.views().iter().map(|view| view.name()).collect();
    println!("cgroup views of this machine: {}", views.join(", "));

    let conclusion = libtest_mimic::run(&arguments, trials);

    let left = rig.end();
    for what in &left {
        eprintln!("left behind: {what}");
    }
    if conclusion.has_failed() || !left.is_empty() {
        eprintln!("logs: {}", rig::run::directory().join("logs").display());
        return ExitCode::FAILURE;
    }
    let _ = std::fs::remove_dir_all(rig::run::directory()); // the next run tries again
    conclusion.exit_code()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("the trials on a real engine need Linux");
    std::process::exit(1);
}
