export * from "rivetkit/client";
